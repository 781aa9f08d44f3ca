//! Little-endian fields at fixed offsets of a block. Offsets are constants of a format, so out of range is a bug.

pub(crate) fn put<const N: usize>(block: &mut [u8], offset: usize, field: [u8; N]) {
    block[offset..offset + N].copy_from_slice(&field);
}

pub(crate) fn take<const N: usize>(block: &[u8], offset: usize) -> [u8; N] {
    block[offset..offset + N].try_into().expect("a slice of N bytes is an array of N bytes")
}

pub(crate) fn u16_at(block: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(take(block, offset))
}

pub(crate) fn u32_at(block: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(take(block, offset))
}

pub(crate) fn u64_at(block: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(take(block, offset))
}
