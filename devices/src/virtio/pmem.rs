//! Persistent memory (VIRTIO 1.2 section 5.19).
