#!/usr/bin/env python3
"""Writes one docker archive with many images, without a daemon.

Usage: archive.py OUT.tar SPECIFICATION.json

The specification is a list of images:
  tag         full name
  files       destination -> path, or "->TARGET" for a symbolic link
  rootfs      tar of the layer below the files (optional)
  entrypoint  list or null
  user        optional
"""
import hashlib
import io
import json
import os
import sys
import tarfile


def layer(files):
    """The uncompressed tar of these files, with the folders they need; the same bytes for the same files."""
    buffer = io.BytesIO()
    folders = set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for destination, source in sorted(files.items()):
            path = ""
            for part in os.path.dirname(destination).strip("/").split("/"):
                path += part + "/"
                if part and path not in folders:
                    folders.add(path)
                    folder = tarfile.TarInfo(path)
                    folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(folder)
            entry = tarfile.TarInfo(destination.lstrip("/"))
            if source.startswith("->"):
                entry.type, entry.linkname = tarfile.SYMTYPE, source[2:]
                tar.addfile(entry)
                continue
            entry.size, entry.mode = os.path.getsize(source), 0o755
            with open(source, "rb") as content:
                tar.addfile(entry, content)
    return buffer.getvalue()


def main(out, specification):
    blobs, manifest, repositories = {}, [], {}
    with open(specification) as text:
        images = json.load(text)
    for image in images:
        layers = []
        if image.get("rootfs"):
            with open(image["rootfs"], "rb") as rootfs:
                layers.append(rootfs.read())
        layers.append(layer(image["files"]))
        digests = [hashlib.sha256(content).hexdigest() for content in layers]
        blobs.update({digest + ".tar": content for digest, content in zip(digests, layers)})
        config = json.dumps({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Entrypoint": image["entrypoint"],
                "User": image.get("user", ""),
            },
            "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest for digest in digests]},
            "history": [{"created_by": "archive.py"}] * len(digests),
        }, sort_keys=True).encode()
        name = hashlib.sha256(config).hexdigest() + ".json"
        blobs[name] = config
        manifest.append({"Config": name, "RepoTags": [image["tag"]], "Layers": [d + ".tar" for d in digests]})
        repository, version = image["tag"].rsplit(":", 1)
        repositories.setdefault(repository, {})[version] = digests[-1]
    # kind learns all names of an archive only from a `repositories` member that comes first.
    members = [("repositories", json.dumps(repositories).encode()), ("manifest.json", json.dumps(manifest).encode())]
    with tarfile.open(out, "w") as tar:
        for name, content in members + list(blobs.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))


main(*sys.argv[1:])
