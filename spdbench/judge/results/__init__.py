"""Result files: the schema, and reading their runs into one table."""
