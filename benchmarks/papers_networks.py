"""The networks that the submodular runs train for themselves: LeNet on digits, VGG11 on CIFAR-10."""

from __future__ import annotations

import torch
from cifar_data import Cifar
from frank_wolfe_train import batches, train_step
from papers_images import cifar, digits
from papers_run import Options
from torch import nn
from torch.nn import functional as F

#: Channels of VGG11's convolutions; a zero is a pooling.
VGG11 = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
#: Digits that LeNet is trained on; the others test it.
TRAINED_ON = 1000
#: Epochs over CIFAR-10, about five CPU minutes each on one core with bfloat16 in hardware, and over the digits.
VGG_EPOCHS, LENET_EPOCHS = 8, 20


def lenet() -> nn.Module:
    """Two convolutions of 20 and 50 channels and a hidden layer of 500 neurons, for grey images of 28 x 28."""
    features = [nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def vgg11() -> nn.Module:
    """VGG11 with batch norms and one linear layer, for images of 32 x 32."""
    parts: list[nn.Module] = []
    before = 3
    for channels in VGG11:
        if not channels:
            parts.append(nn.MaxPool2d(2))
            continue
        parts += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 10))


def trained(name: str, seed: int, options: Options) -> tuple[nn.Module, Cifar]:
    """A network in eval mode and its data, the calibration images with labels: trained once for each seed, its weights
    kept beside the rows."""
    make, train, load = {"lenet": (lenet, train_lenet, digit_data), "vgg11": (vgg11, train_vgg, vgg_data)}[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
    data = load(options)
    path = options.beside(f"{name}_seed{seed}").with_suffix(".pt")
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(network, data, seed, options)
        part = path.with_suffix(".part")
        torch.save(network.state_dict(), part)
        part.replace(path)
    return network.eval(), data


def digit_data(options: Options) -> Cifar:
    """Digits enlarged to 28 x 28, from -1 to 1."""
    pixels, labels = digits(options.digits)
    images = F.interpolate(pixels.unsqueeze(1), size=(28, 28), mode="bilinear", align_corners=False) * 2 - 1
    first = min(TRAINED_ON, len(labels) // 2)
    test, wanted = images[first:][:10_000], labels[first:][:10_000]
    return Cifar(calibration=images[:first], calibration_labels=labels[:first], test=test, labels=wanted)


def train_lenet(network: nn.Module, data: Cifar, seed: int, options: Options) -> None:
    """Adam, batches of 50, each image shifted by up to two pixels."""
    assert data.calibration_labels is not None
    epochs = options.epochs or (2 if options.quick else LENET_EPOCHS)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.calibration), generator=generator).split(50):
            down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
            images = F.pad(data.calibration[chosen], (2, 2, 2, 2), value=-1.0)
            loss = F.cross_entropy(
                network(images[:, :, down : down + 28, right : right + 28]), data.calibration_labels[chosen]
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()


def vgg_data(options: Options) -> Cifar:
    """CIFAR-10: what is trained on calibrates too, as in the paper."""
    return cifar(options.data, 512 if options.quick else 50_000, 500 if options.quick else None, True)


def train_vgg(network: nn.Module, data: Cifar, seed: int, options: Options) -> None:
    """SGD 0.05 falling linearly to zero, momentum 0.9, weight decay 5e-4, batches of 128, crops and mirror images,
    forward pass in bfloat16."""
    epochs = options.epochs or (1 if options.quick else VGG_EPOCHS)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(data.calibration) // 128)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for epoch in range(epochs):
        running = 0.0
        for images, labels in batches(data, 128, generator):
            running += train_step(network, optimiser, images, labels)
            schedule.step()
        print(f"vgg11 epoch {epoch + 1} of {epochs}: loss {running * epochs / steps:.3f}", flush=True)
