"""Differentially private training of a kernel network, with one backward pass per step."""

import importlib.util
import warnings

import torch
from torch.utils.data import DataLoader, TensorDataset

from kernelnorm.models import vgg8


def main() -> None:
    if importlib.util.find_spec("opacus") is None:
        print("this example needs Opacus: pip install '.[private]'")
        return
    from kernelnorm.privacy import PrivacyEngine

    warnings.filterwarnings("ignore", "Secure RNG")  # for a release: secure_mode=True
    torch.manual_seed(0)
    images, labels = torch.randn(256, 3, 32, 32), torch.randint(0, 10, (256,))
    network = vgg8(width=0.125)
    network, optimizer, batches = (engine := PrivacyEngine()).make_private(
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=32),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in batches:  # Poisson samples: their sizes differ
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
    epsilon = engine.get_epsilon(delta=1e-3)
    print(f"after one epoch: loss {loss:.2f}, epsilon {epsilon:.2f} at delta 0.001")


if __name__ == "__main__":
    main()
