"""Train by lamamba.train from Python, watch it by a callback, sample from it: python examples/train.py"""

import lamamba

options = lamamba.TrainOptions.from_recipe(
    "digits", steps=60, ema_decays=[0.9], sampling={"every": 30}, out="runs/quick-digits",
)
losses = []


def keep(state):
    """Called after every optimizer step with a lamamba.training.loop.StepState."""
    losses.append(state.loss)


result = lamamba.train(options, callbacks=[keep])                               # stopped? The same call resumes it
print(result)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}" if losses else "it was trained to the end before")

sampled = lamamba.sample(lamamba.SampleOptions(model=result.folder, classes=[3, 7], num=4, out="threes-and-sevens.png"))
print(sampled, sampled.images.shape)                                            # uint8 (8, 8, 8, 1)
print(lamamba.plot(lamamba.PlotOptions(runs=[result.folder], out="loss.png")))
