"""The curve of a training: loss on its batches, and on validation pairs with and without BPS."""
from measure.plots import Figure


def draw_curve(rows, file):
    """Write the losses of a log's rows over their steps as PNG."""
    steps, base, steered, training = zip(*((row["step"], row["val_base"], row["val_steered"],
                                            row["train_loss"]) for row in rows))
    figure = Figure(1, ["loss by step"])
    [axes] = figure.axes
    axes.line(steps, training, "training", color=5)
    # at step 0 BPS adds nothing
    axes.line((0, *steps), base[:1] + base, "frozen base", color=1)
    axes.line((0, *steps), base[:1] + steered, "validation", color=3)
    figure.draw().save(file)
