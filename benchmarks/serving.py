"""`textlora serve` under load on loopback: open loop, Poisson arrivals, Zipf over many adapters, latency from
the scheduled send, every answer compared with `AdapterEngine.predict`, an adapter loaded and unloaded all the
while.

python benchmarks/serving.py --texts DATA.parquet --adapters my-adapter other-adapter --count 1000
"""

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import write_result

from textlora import AdapterEngine
from textlora.data import open_stream

CONNECTIONS = 2048
TOLERANCE = 1e-4  # of a probability
MOST_RATE = 4000  # requests a second that may be asked
PAIRS = 7  # of saturation and 80% of it


@dataclass
class Phase:
    """What one stretch of load gave."""

    offered: float
    seconds: float = 0.0
    statuses: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    answers: list[tuple[str, int, bytes]] = field(default_factory=list)
    wrong: int = 0

    def summary(self) -> dict[str, object]:
        spread = (
            {f"p{q}_ms": round(float(np.percentile(self.latencies, q)) * 1e3, 1) for q in (50, 95, 99)}
            if self.latencies
            else {}
        )
        good = round(self.statuses[200] / self.seconds, 1)
        if (
            self.late
        ):  # of the generator itself, from the scheduled send to the true one; part of each latency
            spread["sent_late_p99_ms"] = round(float(np.percentile(self.late, 99)) * 1e3, 1)
        return {
            "offered": round(self.offered, 1),
            "goodput": good,
            "statuses": dict(self.statuses),
            "wrong": self.wrong,
        } | spread


class Client:
    """Keep-alive connections, at most `CONNECTIONS`; a request that finds none waits, and its latency counts
    that."""

    def __init__(self, port: int):
        self.port, self.free, self.bound = port, [], asyncio.Semaphore(CONNECTIONS)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        async with self.bound:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            while True:
                reused = bool(self.free)
                reader, writer = (
                    self.free.pop() if reused else await asyncio.open_connection("127.0.0.1", self.port)
                )
                try:
                    writer.write(head.encode() + body)
                    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
                    break
                except (asyncio.IncompleteReadError, ConnectionError):
                    if not reused:  # else it was idle for half a minute, and the server has closed it
                        raise
            size = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
            answer = await reader.readexactly(size)
            if any(line.lower() == b"connection: close" for line in lines):
                writer.close()
            else:
                self.free.append((reader, writer))
            return int(lines[0].split()[1]), answer


class Load:
    """Requests drawn from texts and adapters, with the answers they must get."""

    def __init__(
        self,
        texts: list[str],
        names: list[str],
        expected: dict[tuple[str, int], dict[str, float]],
        seed: int = 0,
    ):
        self.texts, self.names, self.expected, self.draw = texts, names, expected, np.random.default_rng(seed)
        weights = 1 / np.arange(1, len(names) + 1)
        self.weights = weights / weights.sum()
        self.drawn: Iterator[tuple[str, int, bytes]] = iter(())

    def prepare(self, count: int) -> None:
        """Draw the next requests: what is done before and after a phase takes nothing from the server
        meanwhile."""
        names = self.draw.choice(len(self.names), size=count, p=self.weights).tolist()
        texts = self.draw.integers(len(self.texts), size=count).tolist()
        self.drawn = iter(
            [
                (self.names[n], t, json.dumps({"inputs": self.texts[t], "model": self.names[n]}).encode())
                for n, t in zip(names, texts, strict=True)
            ]
        )

    async def ask(self, client: Client, phase: Phase, scheduled: float) -> None:
        name, text, body = next(self.drawn)
        status, answer = await client.post("/predict", body)
        phase.statuses[status] += 1
        if status == 200:
            phase.latencies.append(time.perf_counter() - scheduled)
            phase.answers.append((name, text, answer))

    def check(self, phase: Phase) -> None:
        for name, text, answer in phase.answers:
            want = self.expected[name.rpartition("-")[0], text]
            phase.wrong += any(
                abs(row["score"] - want[row["label"]]) > TOLERANCE for row in json.loads(answer)
            )
        phase.answers.clear()

    async def open_loop(self, client: Client, rate: float, seconds: float) -> Phase:
        self.prepare(int(rate * seconds * 1.2) + 100)
        phase, begun, at, running = Phase(rate), time.perf_counter(), 0.0, set()
        while (at := at + float(self.draw.exponential(1 / rate))) < seconds:
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            phase.late.append(time.perf_counter() - begun - at)
            task = asyncio.create_task(self.ask(client, phase, begun + at))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        phase.seconds = max(seconds, time.perf_counter() - begun)
        self.check(phase)
        return phase

    async def closed_loop(self, client: Client, clients: int, seconds: float) -> Phase:
        self.prepare(int(MOST_RATE * seconds))
        phase, until = Phase(0.0), time.perf_counter() + seconds

        async def one() -> None:
            while (now := time.perf_counter()) < until:
                await self.ask(client, phase, now)

        await asyncio.gather(*(one() for _ in range(clients)))
        phase.seconds = seconds
        self.check(phase)
        return phase


async def churn(client: Client, folder: Path, stop: asyncio.Event) -> int:
    """Load and unload an adapter until told to stop; how often."""
    times = 0
    while not stop.is_set():
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "churn", "lora_path": str(folder)}),
            ("/v1/unload_lora_adapter", {"lora_name": "churn"}),
        ):
            status, answer = await client.post(path, json.dumps(body).encode())
            if status != 200:
                raise SystemExit(f"{path}: {status} {answer[:200]}")
        times += 1
        await asyncio.sleep(0.2)
    return times


def offline_rate(engine: AdapterEngine, load: Load) -> float:
    """Texts per second of the engine alone: the same adapters and draw, 64 texts a batch, every adapter in
    memory."""
    picked = [load.names[k] for k in load.draw.choice(len(load.names), size=len(load.texts), p=load.weights)]
    batches = [(load.texts[i : i + 64], picked[i : i + 64]) for i in range(0, len(load.texts), 64)]
    for texts, names in batches:
        engine.predict(texts, names)
    begun = time.perf_counter()
    for texts, names in batches:
        engine.predict(texts, names)
    return len(load.texts) / (time.perf_counter() - begun)


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return next(
            float(line.split()[1])
            for line in answer.read().decode().splitlines()
            if line.startswith(name + " ")
        )


def resident_bytes(pid: int) -> int:
    """Of the server's processes: the one that listens and the one that computes."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in pids) * os.sysconf(
        "SC_PAGE_SIZE"
    )


async def measure(load: Load, port: int, pid: int, folder: Path, seconds: float) -> dict[str, object]:
    client, stop = Client(port), asyncio.Event()
    # the engine and its adapters are here too: looking through them for garbage would hold up the sends
    gc.freeze()
    for i in range(0, len(load.names), 64):  # every adapter is read once
        await client.post(
            "/predict", json.dumps({"inputs": "warm", "model": load.names[i : i + 64]}).encode()
        )
    churning = asyncio.create_task(churn(client, folder, stop))
    await load.closed_loop(client, 64, min(5.0, seconds))
    saturated, steady, batches = [], [], []
    for _ in range(PAIRS):  # next to each other: a machine's speed changes within a minute
        before, rows = metric(port, "textlora_batch_rows_count"), metric(port, "textlora_batch_rows_sum")
        saturated.append(await load.closed_loop(client, 64, seconds))
        batches.append(
            (metric(port, "textlora_batch_rows_sum") - rows)
            / (metric(port, "textlora_batch_rows_count") - before)
        )
        steady.append(await load.open_loop(client, 0.8 * saturated[-1].statuses[200] / seconds, seconds))
    most = statistics.median(phase.statuses[200] for phase in saturated) / seconds
    memory, floods = [resident_bytes(pid)], []
    for _ in range(3):  # the first opens the connections; flat is what the next add nothing to
        floods.append(await load.open_loop(client, 3 * most, seconds))
        memory.append(resident_bytes(pid))
    stop.set()
    return {
        "saturation": [phase.summary() for phase in saturated], "mean_batch": round(statistics.median(batches), 1),
        "at_80_percent": [phase.summary() for phase in steady], "at_300_percent": [flood.summary() for flood in floods],
        "memory_mib": [round(bytes / 2**20) for bytes in memory], "loads_and_unloads": await churning,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True, help="data file with a column text")
    parser.add_argument("--adapters", required=True, nargs="+", help="folders; copies of them are registered")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="write results/serving.json")
    options = parser.parse_args()
    with open_stream(options.texts) as stream:
        texts = [row.text for row, _ in zip(stream, range(options.rows), strict=False)]
    import torch

    torch.set_num_threads(options.threads)
    engine = AdapterEngine("minilm", device="cpu")
    folders = {Path(folder).name: Path(folder).resolve() for folder in options.adapters}
    expected = {}
    for name, folder in folders.items():
        engine.add(folder, name)
        expected |= {(name, i): found.scores for i, found in enumerate(engine.predict(texts, name))}
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"{list(folders)[i % len(folders)]}-{i}" for i in range(options.count)]
        for i, name in enumerate(names):
            (Path(scratch) / name).mkdir()
            for file in folders[list(folders)[i % len(folders)]].iterdir():
                if file.is_file():
                    os.link(file, Path(scratch) / name / file.name) if file.stat().st_dev == os.stat(
                        scratch
                    ).st_dev else (Path(scratch) / name / file.name).write_bytes(file.read_bytes())
        load = Load(texts, names, expected)
        for name in names:
            engine.add(Path(scratch) / name, name)
        offline = [offline_rate(engine, load)]
        command = [
            str(Path(sys.executable).parent / "textlora"),
            "serve",
            "--port",
            "0",
            "--adapter-dir",
            scratch,
            "--load-from",
            scratch,
        ]
        with tempfile.TemporaryFile("w+") as log:
            server = subprocess.Popen([*command, "--threads", str(options.threads)], stderr=log, text=True)
            try:
                while not (
                    found := [
                        line
                        for line in Path(f"/proc/{os.getpid()}/fd/{log.fileno()}").read_text().splitlines()
                        if '"listening"' in line
                    ]
                ):
                    time.sleep(0.1)
                port = int(json.loads(found[0])["url"].rpartition(":")[2])
                result = asyncio.run(
                    measure(load, port, server.pid, Path(scratch) / names[0], options.seconds)
                )
            finally:
                server.terminate()
                server.wait(60)
        offline.append(offline_rate(engine, load))
        most = statistics.mean(offline)
    result |= {
        "offline_texts_per_second": [round(rate, 1) for rate in offline],
        "adapters": options.count,
        "seconds": options.seconds,
        "threads": options.threads,
    }
    print(json.dumps(result, indent=2))
    if options.write:
        rate = statistics.median(phase["goodput"] for phase in result["saturation"])
        late = [phase["p99_ms"] for phase in result["at_80_percent"]]
        refused = sum(
            sum(phase["statuses"].values()) - phase["statuses"].get(200, 0)
            for phase in result["at_80_percent"]
        )
        flood = min(result["at_300_percent"], key=lambda phase: phase["goodput"])
        wrong = sum(
            phase["wrong"]
            for kind in ("saturation", "at_80_percent", "at_300_percent")
            for phase in result[kind]
        )
        memory = ", ".join(map(str, result["memory_mib"]))
        rows = [
            (
                f"server at saturation, {options.count:,} adapters, Zipf: texts/s, share of the engine's offline rate",
                f"{rate:,.0f}, {rate / most:.0%}",
            ),
            ("... mean batch there", f"{result['mean_batch']:.1f} texts"),
            (
                f"... at 80% of it: p99 from the scheduled send, median of {PAIRS} (lowest to highest); answers that were not 200",
                f"{statistics.median(late):.0f} ms ({min(late):.0f} to {max(late):.0f}); {refused}",
            ),
            (
                "... at 300%, three times: lowest goodput, share of saturation",
                f"{flood['goodput'] / rate:.0%}",
            ),
            ("... server memory before and after each", f"{memory} MiB"),
            ("... answers that differed from the engine's", f"{wrong}"),
        ]
        write_result("serving", "textlora serve under load on loopback", rows, result)


if __name__ == "__main__":
    main()
