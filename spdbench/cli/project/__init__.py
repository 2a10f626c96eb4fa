"""The commands `project` and `profile`: what results promise on other devices, and what one device costs."""
