"""The only modules that import transformers or vLLM."""
