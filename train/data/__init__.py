"""Where text comes from, how it becomes tokens, and which tokens a step sees."""
