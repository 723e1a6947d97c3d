"""Container images for the tests, made of Debian's static busybox: no registry is needed for them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

# There is no bash in the image: clients that ask for one get the shell that there is.
FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\napp:x:1001:1001::/home/app:/bin/sh\n",
    "etc/group": b"root:x:0:\napp:x:1001:\n",
    "etc/image": b"busybox of the tests\n",
}
CONFIG = {
    "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "FROM_IMAGE=yes"],
    "WorkingDir": "/home/app",
    "User": "app",
    "Cmd": ["/bin/sh", "-c", "echo started > /tmp/started; exec sleep 100000"],
}


def busybox(cache: Path) -> Path:
    """Debian's static busybox."""
    program = cache / "busybox"
    if not program.exists():
        with tempfile.TemporaryDirectory() as directory:
            # apt drops its privileges for downloads.
            Path(directory).chmod(0o777)
            subprocess.run(["apt-get", "download", "-q", "busybox-static"], cwd=directory, check=True)
            (package,) = Path(directory).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
            cache.mkdir(parents=True, exist_ok=True)
            (Path(directory) / "bin/busybox").rename(program)
    return program


def layer(program: Path) -> bytes:
    """The one layer of the image, as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:

        def add(name: str, data: bytes | None = None, mode: int = 0o755, **more) -> None:
            info = tarfile.TarInfo(name)
            info.mode = mode
            for field, value in more.items():
                setattr(info, field, value)
            if data is not None:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data is not None else None)

        for name in ["bin", "etc", "root", "home", "dev", "proc", "sys", "run", "usr", "var"]:
            add(name, type=tarfile.DIRTYPE)
        add("tmp", mode=0o1777, type=tarfile.DIRTYPE)
        add("home/app", type=tarfile.DIRTYPE, uid=1001, gid=1001)
        add("bin/busybox", program.read_bytes())
        applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
        for applet in applets.stdout.split():
            if applet != "busybox":
                add(f"bin/{applet}", type=tarfile.SYMTYPE, linkname="busybox")
        for name, data in FILES.items():
            add(name, data, mode=0o644)
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Image:
    layer: bytes
    config: bytes

    @classmethod
    def make(cls, cache: Path) -> "Image":
        data = layer(busybox(cache))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": CONFIG,
            "rootfs": {"type": "layers", "diff_ids": [sha256(data)]},
        }
        return cls(data, json.dumps(config).encode())

    def save(self, path: Path, name: str) -> None:
        """Writes what `docker save` would."""
        config = f"{hashlib.sha256(self.config).hexdigest()}.json"
        manifest = [{"Config": config, "RepoTags": [name], "Layers": ["layer.tar"]}]
        with tarfile.open(path, "w") as tar:
            for member, data in {
                config: self.config,
                "layer.tar": self.layer,
                "manifest.json": json.dumps(manifest).encode(),
            }.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def push(self, registry: "Registry", name: str, tag: str) -> str:
        """Pushes the image; returns its digest."""
        packed = gzip.compress(self.layer, mtime=0)
        with registry.http() as http:
            for blob in (self.config, packed):
                started = http.post(f"/v2/{name}/blobs/uploads/")
                started.raise_for_status()
                where = httpx.URL(started.headers["location"]).copy_merge_params({"digest": sha256(blob)})
                http.put(where, content=blob).raise_for_status()
            kind = "application/vnd.oci.image"
            manifest = json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": f"{kind}.manifest.v1+json",
                    "config": {
                        "mediaType": f"{kind}.config.v1+json",
                        "digest": sha256(self.config),
                        "size": len(self.config),
                    },
                    "layers": [
                        {
                            "mediaType": f"{kind}.layer.v1.tar+gzip",
                            "digest": sha256(packed),
                            "size": len(packed),
                        }
                    ],
                }
            ).encode()
            headers = {"Content-Type": f"{kind}.manifest.v1+json"}
            http.put(f"/v2/{name}/manifests/{tag}", content=manifest, headers=headers).raise_for_status()
        return sha256(manifest)


class Registry:
    """Debian's docker-registry on the loopback."""

    def __init__(self, directory: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = directory / "registry.json"
        config.write_text(
            json.dumps(
                {
                    "version": 0.1,
                    "log": {"level": "error"},
                    "storage": {"filesystem": {"rootdirectory": str(directory / "registry")}},
                    "http": {"addr": f"127.0.0.1:{self.port}"},
                }
            )
        )
        self.process = subprocess.Popen(
            ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/v2/").raise_for_status()
                return
            except httpx.TransportError:
                assert self.process.poll() is None and time.monotonic() < deadline, "no registry"
                time.sleep(0.1)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
