"""One block: contextual layers, a block made of one and an MLP, and the papers' transformer."""
