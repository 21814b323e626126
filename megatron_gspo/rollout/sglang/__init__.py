"""All that knows SGLang: its servers, its protocol, what it returns."""
