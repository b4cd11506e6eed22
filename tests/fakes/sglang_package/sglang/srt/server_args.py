"""The flags of which the fake has a use, and those that make it misbehave."""

import argparse


def prepare_server_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tp-size", type=int, required=True)
    parser.add_argument("--fail-start", default="")
    parser.add_argument("--never-healthy", action="store_true")
    parser.add_argument("--deaf", action="store_true")
    return parser.parse_known_args(argv)[0]
