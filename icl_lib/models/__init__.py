"""Whole models: where their parts are, the edits that replace a prompt, and the check that they do."""
