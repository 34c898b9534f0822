"""From examples to a PEFT directory: VB-LoRA trained with PEFT over a frozen base.

Needs peft, which serving does not. Knows nothing of HTTP, and nothing of where adapters are served.
"""
