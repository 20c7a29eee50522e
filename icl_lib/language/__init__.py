"""Language models that read token ids: their anatomies, their edits, and the prompt as an adapter."""
