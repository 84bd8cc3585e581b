"""Looking inside encoders: similarity of layers (CKA), attention, health of features, maps; and advice from them."""
