"""Networks, one family per file: inference, generative, loss, predict. A batch of tensors in, tensors out."""
