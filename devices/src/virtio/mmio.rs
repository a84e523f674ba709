//! mmio
