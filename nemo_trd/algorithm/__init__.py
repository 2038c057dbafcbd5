"""The paper as pure functions: prompts, contexts, acceptance, trajectories, micro-batches."""
