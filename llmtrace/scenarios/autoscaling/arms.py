"""The autoscaling scenario's name, its one gateway, and the two kinds of requests that go through it."""

from __future__ import annotations

NAME = "autoscaling"
ARM = "autoscaled"
ARMS = (ARM,)
CHATS = "chats"
"""Short requests to the stack's model. They wait like others; the scaler's metrics do not count them."""
REPORTS = "reports"
"""Long requests to another name of the same model, the one whose queue the scaler looks at."""
DRIVING = f"-{REPORTS}"
"""What the name of the model ends in whose requests drive the scaler."""
