"""What a stack learns from the model and a text before its plan is final."""
