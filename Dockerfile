# The image of all of Holdfast's processes: each pod says which program it runs and as whom.
# `docker build .` compiles the programs in the image; `--target prebuilt` takes them from the build context
# (`cargo xtask image`). The order of the stages lets builders that build all stages up to the target do that too.

FROM debian:trixie-slim AS base
# mkfs, fsck and resize of both file systems; mount, blkid and blockdev. xfsprogs names python for one tool that is of no
# use here, so its dependencies are not followed.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends e2fsprogs mount util-linux libinih1 liburcu8t64 libblkid1 libuuid1 libedit2 \
    && cd /tmp && apt-get download xfsprogs && dpkg --force-depends --install xfsprogs_*.deb && rm xfsprogs_*.deb \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
USER 65534:65534
CMD ["holdfast", "--help"]

FROM base AS prebuilt
COPY holdfast holdfast-csi holdfast-operator /usr/bin/

FROM rust:1.95-trixie AS build
WORKDIR /holdfast
COPY . .
RUN cargo build --locked --profile image -p holdfast-cli -p holdfast-csi -p holdfast-operator

FROM base
COPY --from=build /holdfast/target/image/holdfast /holdfast/target/image/holdfast-csi /holdfast/target/image/holdfast-operator /usr/bin/
