"""Language models that are fed token ids: their anatomies, their edits, and the prompt as an adapter."""
