"""HTTP to a server, its errors, and the events of its streams."""
