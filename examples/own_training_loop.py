"""Train by a loop of your own, with our network, noise schedule and loss: python examples/own_training_loop.py"""

import torch

from lamamba import LaMambaUNet, UNetConfig
from lamamba.data.digits import Digits
from lamamba.diffusion.guidance import drop_labels
from lamamba.diffusion.loss import training_loss
from lamamba.diffusion.schedule import make_schedule

digits = Digits()                                                               # 1,797 images, 8 x 8, in [-1, 1]
images, classes = torch.from_numpy(digits.images).float() / 127.5 - 1, torch.from_numpy(digits.labels)
config = UNetConfig(width=32, num_heads=4, depths=(1, 1, 1, 1), bottleneck_depth=1, window_size=4, in_channels=1,
                    num_classes=10, grid=8, objective="flow")
model, schedule = LaMambaUNet(config), make_schedule(config.objective)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
torch.manual_seed(0)
for step in range(1, 61):
    batch = torch.randint(len(images), (64,))
    x0, eps = images[batch], torch.randn(64, 1, 8, 8)                           # (b, c, h, w)
    t = schedule.timestep(torch.rand(64))                                       # (b,) in 0 .. 1000
    xt = schedule.add_noise(x0, eps, t)
    labels = drop_labels(classes[batch], torch.rand(64), 0.1, config.num_classes)
    loss = training_loss(model(xt, t, labels), x0, xt, t, eps, schedule).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained("own-model")                                              # lamamba sample own-model --classes 3
