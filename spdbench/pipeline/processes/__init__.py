"""A pipeline whose stages are processes: the controller's side, the stages' side, and the messages between them."""
