"""What `pip install gohsp` alone is good for: a module of one's own is pruned, saved, and loaded by another process.

python three_lines.py prune FOLDER, and then python three_lines.py load FOLDER; each prints one line of JSON.
"""

import json
import sys
import time

BEGAN = time.perf_counter()

import torch  # noqa: E402
from torch import nn  # noqa: E402

import gohsp  # noqa: E402


class Mine(nn.Module):
    """A small ViT of PyTorch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.patches, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 10)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.patches(images).flatten(2).mT).mean(1))


torch.manual_seed(0)
dense, images = Mine().eval(), [torch.randn(3, 32, 32) for _ in range(48)]
verb, folder = sys.argv[1:]
if verb == "prune":
    small = gohsp.prune(dense, images, "params=-30%").model
    gohsp.save(small, folder)
else:
    small = gohsp.load(folder, into=dense)
with torch.no_grad():
    output = small(images[0][None]).flatten().tolist()
params = sum(parameter.numel() for parameter in small.parameters())
seconds = {"seconds": time.perf_counter() - BEGAN, "cpu_seconds": time.process_time()}
print(json.dumps({"params": params, "output": output, **seconds}))
