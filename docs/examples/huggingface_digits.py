"""The digits by a small vision transformer in a Hugging Face Trainer; each row is a token.

pip install transformers accelerate
"""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from distbelief import DataLoader, Downpour, worker

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--save", metavar="FOLDER", help="write the model here")
args = parser.parse_args()


class SharingTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by accelerate, which would put a loader of its own in this one's place."""
        return DataLoader(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=self.data_collator,
        )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}


torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
samples = [
    {"pixel_values": image, "labels": label}
    for image, label in zip(images, digits.tolist(), strict=True)
]
train_set, test_set = train_test_split(samples, test_size=360, stratify=digits, random_state=0)

config = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=8,
    patch_size=(1, 8),
    num_channels=1,
    num_labels=10,
    initializer_range=0.1,
)
model = ViTForImageClassification(config)
trainer = SharingTrainer(
    model,
    TrainingArguments(
        output_dir=args.save or tempfile.gettempdir(),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="constant",  # the shards apply the rate; its course is schedule=
        save_strategy="no",  # four workers would write over one another; see --save
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=train_set,
    eval_dataset=test_set,
    compute_metrics=accuracy,
    optimizers=(Downpour(model.parameters(), lr=0.02, momentum=0.5), None),
)
trainer.train()
if args.save and worker().index == 0:
    trainer.save_model(args.save)

print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
