"""What is measured of two encoders and a predictor, a quantity a file. In: tensors. Out: tensors; nothing is decided here."""
