"""The gradient of each sample on its own, as differentially private training needs it."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from kernelnorm.models import create_model

network = create_model("vgg8", norm="kernel", width=0.25)
parameters = dict(network.named_parameters())


def loss(parameters, image, label):
    return F.cross_entropy(functional_call(network, parameters, image[None]), label[None])


images, labels = torch.rand(4, 3, 32, 32), torch.randint(0, 10, (4,))
gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(
    parameters, images, labels
)
norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
print(f"gradient norms of the {len(norms)} samples: {norms.tolist()}")
