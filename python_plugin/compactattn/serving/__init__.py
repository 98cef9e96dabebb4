"""What the adapters of serving engines share: whose a request is, an operator's options, the call, counters.

Nothing here imports an engine or torch.
"""
