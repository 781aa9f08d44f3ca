//! Little-endian numbers at offsets of a block.
//!
//! Callers hold whole blocks and constant offsets, so a range out of bounds is a bug and panics.

pub trait Fields {
    fn u16_at(&self, offset: usize) -> u16;
    fn u32_at(&self, offset: usize) -> u32;
    fn u64_at(&self, offset: usize) -> u64;
}

pub trait FieldsMut {
    fn put_u16(&mut self, offset: usize, value: u16);
    fn put_u32(&mut self, offset: usize, value: u32);
    fn put_u64(&mut self, offset: usize, value: u64);
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes[offset..offset + N].try_into().expect("the range has N bytes")
}

impl Fields for [u8] {
    fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes(array(self, offset))
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(array(self, offset))
    }

    fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(array(self, offset))
    }
}

impl FieldsMut for [u8] {
    fn put_u16(&mut self, offset: usize, value: u16) {
        self[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        self[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, offset: usize, value: u64) {
        self[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
}
