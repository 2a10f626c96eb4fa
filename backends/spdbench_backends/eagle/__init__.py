"""`eagle`: a draft head that predicts the target's next features, EAGLE-1, 2 and 3."""
