"""A small convolutional network learns handwritten digits."""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from distbelief import DataLoader, Downpour

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=32)
args = parser.parse_args()

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
parts = train_test_split(images, digits, test_size=360, stratify=digits, random_state=0)
train_x, test_x = (
    torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2]
)
train_y, test_y = (torch.tensor(part) for part in parts[2:])

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(128, 10),
)
optimizer = Downpour(model.parameters(), lr=0.05, momentum=0.5)
train_set = list(zip(train_x, train_y, strict=True))
loader = DataLoader(train_set, args.batch_size, shuffle=True)

for _ in range(args.epochs):
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
print(f"test accuracy {accuracy:.3f}")
