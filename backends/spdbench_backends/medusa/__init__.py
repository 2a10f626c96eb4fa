"""`medusa`: several heads on the target's last hidden state, each for a token further ahead."""
