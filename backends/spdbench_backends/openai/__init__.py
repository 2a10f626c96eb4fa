"""`openai`: any server that speaks OpenAI's protocol, from outside."""
