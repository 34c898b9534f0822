"""The HTTP application over an `EngineClient`: OpenAI's routes, adapters, metrics. No Ray."""
