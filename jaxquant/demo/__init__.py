"""The demo: a real small model, quantized while it loads, compared with its BF16 self."""
