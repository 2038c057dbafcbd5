"""How good a model's answers are: sampling, judging, counting, resuming."""
