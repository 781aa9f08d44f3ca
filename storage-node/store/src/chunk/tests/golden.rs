//! Every block of the format, byte for byte: what this version writes is in `testdata/chunk/`, and so is what it must
//! be able to read for ever. A change that breaks one of these needs a new version of the block, and a new file.

use bytes::Bytes;

use crate::chunk::header::{Copy, Counts, Header, StateHome};
use crate::chunk::layout::{Layout, Place};
use crate::chunk::page::{Child, Inner, Leaf, Page, PageError, PageId, PageRef, Root, SlotEntry};
use crate::chunk::snapshot::{Snapshot, TableHome, decode_table, encode_table};
use crate::chunk::tests::harness::{group, replica};
use crate::device::{BLOCK_BYTES, Region};

/// The rows of sixteen bytes that are not all zero.
fn rows(block: &[u8]) -> String {
    let row = |(i, row): (usize, &[u8])| {
        let hex: Vec<String> =
            row.chunks(4).map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        format!("{:04x}: {}\n", i * 16, hex.join(" "))
    };
    block.chunks(16).enumerate().filter(|(_, row)| row.iter().any(|byte| *byte != 0)).map(row).collect()
}

fn block_of(rows: &str) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    for row in rows.lines() {
        let (offset, hex) = row.split_once(": ").unwrap();
        let offset = usize::from_str_radix(offset, 16).unwrap();
        let digits: Vec<u8> = hex.bytes().filter(|byte| *byte != b' ').collect();
        for (i, pair) in digits.chunks(2).enumerate() {
            block[offset + i] = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        }
    }
    block
}

macro_rules! golden {
    ($name:literal) => {
        (include_str!(concat!("../../../testdata/chunk/", $name, ".txt")), $name)
    };
}

fn check(written: &[u8], (golden, name): (&str, &str)) -> Vec<u8> {
    assert!(rows(written) == golden, "{name} is now\n{}", rows(written));
    block_of(golden)
}

fn layout() -> Layout {
    Layout::new(Region::new(1 << 20, 64 << 20), 16).unwrap()
}

fn page_id(level: u8, number: u64) -> PageId {
    PageId { group: group(3), replica: replica(9), level, number }
}

fn header(state: StateHome) -> Header {
    Header {
        group: group(3),
        replica: replica(9),
        deleted: false,
        entry: 5,
        generation: 12,
        index: 1000,
        wal_sequence: 77,
        write_back_to: 1010,
        root: Root { page: Some(PageRef { place: Place(64), crc: 0xdead_beef }), level: 2 },
        counts: Some(Counts { slots: 4, pages: 5, hash: 0x0123_4567_89ab_cdef_0011_2233_4455_6677 }),
        forget_below: 900,
        installing: 1200,
        era: 7,
        table: Some(TableHome { place: Place(96), snapshots: 2, crc: 0x0506_0708 }),
        hard_state: Bytes::from_static(b"hard state"),
        position: Bytes::from_static(b"position"),
        state,
    }
}

#[test]
fn the_region_header_is_as_drawn() {
    let block = check(&layout().encode(), golden!("region_2"));
    assert_eq!(Layout::decode(layout().region, &block).unwrap(), layout());
    assert!(Layout::decode(Region::new(1 << 20, 65 << 20), &block).is_err(), "another region");
    let (former, _) = golden!("region");
    assert!(Layout::decode(layout().region, &block_of(former)).is_err(), "version 1 knew no snapshots");
}

#[test]
fn a_group_header_is_as_drawn() {
    let inline = header(StateHome::Inline(Bytes::from_static(b"state")));
    let block = check(&inline.encode(), golden!("header_inline_2"));
    assert_eq!(Header::decode(&layout(), 5, &block), Copy::Valid(Box::new(inline)));
    assert_eq!(Header::decode(&layout(), 6, &block), Copy::Invalid, "it belongs to another entry");

    let places = vec![Place(48), Place(80)];
    let in_slots = header(StateHome::Slots { places, bytes: 70_000, crc: 0x1234_5678 });
    let block = check(&in_slots.encode(), golden!("header_slots_2"));
    assert_eq!(Header::decode(&layout(), 5, &block), Copy::Valid(Box::new(in_slots)));

    let mut deleted = header(StateHome::Inline(Bytes::new()));
    deleted.deleted = true;
    deleted.root = Root::default();
    deleted.counts = None;
    deleted.table = None;
    let block = check(&deleted.encode(), golden!("header_deleted_2"));
    assert_eq!(Header::decode(&layout(), 5, &block), Copy::Valid(Box::new(deleted)));
}

#[test]
fn a_leaf_is_as_drawn() {
    let mut leaf = Leaf { born: 5, ..Leaf::empty() };
    leaf.slots[0] = SlotEntry { place: Place(48), index: 1000, present: 0b101, lost: 0b1000, born: 6 };
    leaf.slots[15] = SlotEntry { place: Place::NONE, index: 999, ..SlotEntry::default() };
    leaf.checksums[0] = 0x0403_0201;
    leaf.checksums[2] = 0x0807_0605;
    let page = Page::Leaf(Box::new(leaf));
    let id = page_id(0, 7);
    let block = check(&page.encode(&id, 12), golden!("leaf_2"));
    let crc = crc32c::crc32c(&block);
    assert_eq!(Page::decode(&layout(), &id, crc, &block), Ok(page));
    assert_eq!(Page::decode(&layout(), &id, crc ^ 1, &block), Err(PageError::Checksum));
    for other in [page_id(0, 8), page_id(1, 7), PageId { group: group(4), ..id }, PageId { replica: replica(8), ..id }]
    {
        assert_eq!(Page::decode(&layout(), &other, crc, &block), Err(PageError::Identity));
    }
}

#[test]
fn an_inner_page_is_as_drawn() {
    let mut inner = Inner { born: 5, ..Inner::empty() };
    inner.children[0] = Some(Child { page: PageRef { place: Place(49), crc: 0x1122_3344 }, index: 1000 });
    inner.children[200] = Some(Child::LOST);
    inner.children[255] = Some(Child { page: PageRef { place: Place(50), crc: 0x5566_7788 }, index: 0x0102_0304_0506 });
    let page = Page::Inner(Box::new(inner));
    let id = page_id(2, 1);
    let block = check(&page.encode(&id, 12), golden!("inner_2"));
    assert_eq!(Page::decode(&layout(), &id, crc32c::crc32c(&block), &block), Ok(page));
}

#[test]
fn a_table_of_snapshots_is_as_drawn() {
    let root = Root { page: Some(PageRef { place: Place(64), crc: 0xdead_beef }), level: 2 };
    let counts = Some(Counts { slots: 4, pages: 5, hash: 0x0123_4567_89ab_cdef_0011_2233_4455_6677 });
    let read = |_| Some(Bytes::from_static(b"state and what lies behind it"));
    let snapshots =
        [(900, 3, Root::default(), None, 112), (901, 5, root, counts, 128)].map(|(index, era, root, counts, place)| {
            Snapshot {
                index,
                era,
                root,
                counts,
                position: Bytes::from_static(b"position"),
                state: Bytes::from_static(b"state"),
                state_place: Place(place),
            }
        });
    let mut table = encode_table(&snapshots).to_vec();
    let home = TableHome { place: Place(96), snapshots: 2, crc: crc32c::crc32c(&table) };
    table.resize(BLOCK_BYTES, 0);
    let mut block = check(&table, golden!("snapshots_2"));
    assert_eq!(decode_table(&layout(), &home, &block, read), Some(snapshots.to_vec()));
    block[0] ^= 1;
    assert_eq!(decode_table(&layout(), &home, &block, read), None);
    for offset in 0..320 {
        for value in [0x00, 0x01, 0x7f, 0xff] {
            let mut hostile = table.clone();
            hostile[offset] = value;
            let home = TableHome { crc: crc32c::crc32c(&hostile[..320]), ..home };
            let _ = decode_table(&layout(), &home, &hostile, read);
        }
    }
}

/// Blocks whose checksum is right and whose fields are not: made by a program that went wrong, or by an enemy.
#[test]
fn hostile_fields_are_refused_and_nothing_panics() {
    let layout = layout();
    let id = page_id(0, 7);
    let sound = Page::Leaf(Box::new(Leaf::lost())).encode(&id, 1);
    let inner_id = page_id(1, 0);
    let sound_inner = Page::Inner(Box::new(Inner::lost())).encode(&inner_id, 1);
    let sound_header = header(StateHome::Inline(Bytes::from_static(b"state"))).encode();
    let mut refused = 0;
    for offset in 0..BLOCK_BYTES {
        for value in [0x00, 0x01, 0x7f, 0xff] {
            let mut leaf = sound.clone();
            leaf[offset] = value;
            let decoded = Page::decode(&layout, &id, crc32c::crc32c(&leaf), &leaf);
            let mut inner = sound_inner.clone();
            inner[offset] = value;
            let decoded_inner = Page::decode(&layout, &inner_id, crc32c::crc32c(&inner), &inner);
            let mut header = sound_header.clone();
            header[offset] = value;
            header[12..16].fill(0);
            let crc = crc32c::crc32c(&header);
            header[12..16].copy_from_slice(&crc.to_le_bytes());
            let copy = Header::decode(&layout, 5, &header);
            refused +=
                u32::from(decoded.is_err()) + u32::from(decoded_inner.is_err()) + u32::from(copy == Copy::Invalid);
        }
    }
    assert!(refused > 1000, "{refused}");
    let mut leaf = Leaf::empty();
    leaf.slots[3] = SlotEntry { place: Place(49), index: 1, present: 1, lost: 0, born: 1 };
    let block = Page::Leaf(Box::new(leaf)).encode(&id, 1);
    let decoded = Page::decode(&layout, &id, crc32c::crc32c(&block), &block);
    assert_eq!(decoded, Err(PageError::Field), "a slot starts at a slot");
}
