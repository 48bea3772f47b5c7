"""The corpus: small random models of every family, exported and quantized as people do it."""
