"""The digits in a Lightning module: Downpour is the optimizer, the rest is Lightning's.

pip install pytorch-lightning
"""

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distbelief import DataLoader, Downpour, worker

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--save", metavar="FILE", help="write a Lightning checkpoint here")
args = parser.parse_args()


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs), targets)

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        inputs, targets = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == targets).float().mean())

    def configure_optimizers(self) -> Downpour:
        return Downpour(self.parameters(), lr=0.05, momentum=0.5)


torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
parts = train_test_split(
    images, torch.tensor(digits), test_size=360, stratify=digits, random_state=0
)
train_x, test_x, train_y, test_y = parts

trainer = pl.Trainer(
    max_epochs=args.epochs,
    accelerator="cpu",
    devices=1,  # of this process; the workers are distbelief's
    logger=False,
    enable_checkpointing=False,  # four workers would write four; see --save
    enable_progress_bar=False,
    enable_model_summary=False,
)
model = Digits()
trainer.fit(model, DataLoader(TensorDataset(train_x, train_y), args.batch_size, shuffle=True))
if args.save and worker().index == 0:
    trainer.save_checkpoint(args.save)

(result,) = trainer.test(model, DataLoader(TensorDataset(test_x, test_y), 360), verbose=False)
print(f"test accuracy {result['accuracy']:.3f}")
