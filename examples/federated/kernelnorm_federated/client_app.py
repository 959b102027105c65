"""The Flower ClientApp: trains on the images of one client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from kernelnorm.experiments.data import Images
from kernelnorm_federated import task
from kernelnorm_federated.aggregation import WEIGHT
from kernelnorm_federated.nodes import OWN_DATA, PLACE
from kernelnorm_federated.partitions import split
from kernelnorm_federated.settings import Settings

app = ClientApp()


@app.query()
def place(message: Message, context: Context) -> Message:
    """Answer the place of this SuperNode; Flower's simulation sets its number and their count.

    Raises:
        ValueError: the configuration with which it was started has no place or a wrong one, or its
            ``data`` is not the absolute path of a folder.
    """
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
    data = context.node_config.get("data")
    if data is not None and not (isinstance(data, str) and Path(data).expanduser().is_absolute()):
        raise ValueError(
            f"data={data!r}: expected the absolute path of a folder, in quotes: "
            "--node-config 'data=\"/data/hospital-0\" ...'"
        )
    answer = ConfigRecord({**node, OWN_DATA: data is not None})
    return Message(RecordDict({"config": answer}), reply_to=message)


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
            "metrics": MetricRecord({WEIGHT: len(images), "train-loss": loss}),
            "config": ConfigRecord({"client": client}),
        }
    )
    return Message(reply, reply_to=message)


def _images(settings: Settings, client: int, own_data: Any) -> Images:
    """Return a client's part of the common images, or all images of the SuperNode's own folder."""
    if own_data is not None:
        own = replace(settings, data=own_data, train_images=0, test_on="test")
        return task.load(own, "train")
    images = task.load(settings, "train")
    chosen = split(images.labels, settings)[client]
    return replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])
