# The CPU image: the binary and the four libraries it links, nothing else; no shell, not root, nothing written.
# Build from the root of the repository: docker build -f deploy/docker/cpu.Dockerfile -t cohort .
ARG RUST_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --profile dist --locked --package cli && cp target/dist/cohort /cohort

# A root with what the binary needs to start: its libraries where the loader looks, and a user.
FROM ${BASE_IMAGE} AS root
COPY --from=build /cohort /root-fs/usr/bin/cohort
COPY deploy/docker/root-fs.sh /root-fs.sh
RUN sh /root-fs.sh /root-fs

FROM scratch
COPY --from=root /root-fs /
USER 65532:65532
ENV XDG_CACHE_HOME=/cache
# Routers: gRPC, HTTP. Groups: routers reach them at the third.
EXPOSE 50051 8080 50052
ENTRYPOINT ["/usr/bin/cohort"]
CMD ["up", "--grpc-listen=0.0.0.0:50051", "--http-listen=0.0.0.0:8080"]
