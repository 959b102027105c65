"""The Flower ClientApp: trains on the images of one client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from kernelnorm.experiments.data import Images
from kernelnorm_federated import task
from kernelnorm_federated.nodes import PLACE
from kernelnorm_federated.partitions import split
from kernelnorm_federated.settings import Settings

app = ClientApp()


@app.query()
def place(message: Message, context: Context) -> Message:
    """Answer the number of this SuperNode and their count; Flower's simulation sets both."""
    node = {key: context.node_config.get(key) for key in PLACE}
    if None in node.values():
        raise ValueError(
            "the SuperNode does not know its place: start it with "
            "--node-config 'partition-id=0 num-partitions=2', and so on"
        )
    number, count = node.values()
    if not (type(number) is type(count) is int and 0 <= number < count):
        raise ValueError(
            f"partition-id={number!r} num-partitions={count!r}: expected whole numbers, the first "
            "from 0 to one less than the second"
        )
    return Message(RecordDict({"config": ConfigRecord(node)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the network that the message brings, and send it back."""
    settings = Settings.from_run_config(context.run_config)
    config = message.content["config"]
    client = config["client"]
    images = _images(settings, client, context.node_config.get("data"))
    if [*images.classes] != config["classes"]:
        raise ValueError(
            f"client {client} has the classes {[*images.classes]}, the server {config['classes']}"
        )
    network = task.build(settings, images)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = task.train(
        network,
        images,
        settings,
        server_round=config["server-round"],
        client=client,
        proximal_mu=config.get("proximal-mu", 0.0),
    )
    reply = RecordDict(
        {
            "arrays": ArrayRecord(network.cpu().state_dict()),
            "metrics": MetricRecord({"num-examples": len(images), "train-loss": loss}),
            "config": ConfigRecord({"client": client}),
        }
    )
    return Message(reply, reply_to=message)


def _images(settings: Settings, client: int, own_data: Any) -> Images:
    """Return a client's part of the common images, or all images of the SuperNode's own folder."""
    if own_data is not None:
        return task.load(replace(settings, data=own_data, train_images=0), "train")
    images = task.load(settings, "train")
    chosen = split(images.labels, settings)[client]
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])
