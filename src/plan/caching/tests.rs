use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn on(capacity: u64, expandable: bool) -> Allocator {
    Allocator::new(Device { capacity, expandable })
}

/// Reserved and allocated bytes after each step; a positive number allocates, a negative one frees by its place.
fn course(allocator: &mut Allocator, steps: &[i64]) -> Vec<(u64, u64)> {
    let mut born = 0;
    steps
        .iter()
        .map(|&step| {
            if step > 0 {
                assert!(allocator.allocate(born, step as u64).unwrap());
                born += 1;
            } else {
                allocator.free(-step as u64).unwrap();
            }
            (allocator.reserved(), allocator.allocated())
        })
        .collect()
}

#[test]
fn sizes_of_segments() {
    // worked by hand from the rules: a request, the segment that it brings, the block that it takes
    let m = MIB;
    for (request, reserved, allocated) in [
        (1, 2 * m, 512),
        (513, 2 * m, 1024),
        (m, 2 * m, m),
        (m + 1, 20 * m, m + 512),
        (10 * m - 512, 20 * m, 10 * m - 512),
        (10 * m, 10 * m, 10 * m),
        (10 * m + 1, 12 * m, 12 * m - (2 * m - 512)), // more than 1 MiB is left: divided
        (11 * m + 1, 12 * m, 12 * m),                 // less than 1 MiB is left: kept whole
        (21 * m, 22 * m, 22 * m),                     // exactly 1 MiB is left: kept whole
        (21 * m - 512, 22 * m, 21 * m - 512),
    ] {
        assert_eq!(course(&mut on(GIB, false), &[request as i64]), [(reserved, allocated)], "{request}");
    }
}

#[test]
fn pages_of_expandable_segments() {
    let m = MIB as i64;
    // 30 MiB need two pages of 20; the 10 that are left take the next 8, and 4 more need a third
    let found = course(&mut on(GIB, true), &[30 * m, 8 * m, 4 * m]);
    assert_eq!(found.iter().map(|found| found.0 >> 20).collect::<Vec<_>>(), [40, 40, 60]);
    // freed in the middle, a block is used again; at the end it grows by what is lacking only
    let found = course(&mut on(GIB, true), &[30 * m, 30 * m, 0, 25 * m, -1, 40 * m]);
    assert_eq!(found.iter().map(|found| found.0 >> 20).collect::<Vec<_>>(), [40, 60, 60, 60, 60, 80]);
}

#[test]
fn the_smallest_free_block_that_fits_is_taken() {
    let m = MIB as i64;
    let mut allocator = on(GIB, false);
    course(&mut allocator, &[40 * m, 30 * m, 60 * m, 0, -1, -2]);
    assert!(allocator.allocate(3, 29 << 20).unwrap());
    assert_eq!((allocator.reserved() >> 20, allocator.allocated() >> 20), (130, 30)); // kept whole
    assert!(allocator.allocate(4, 31 << 20).unwrap());
    assert_eq!((allocator.reserved() >> 20, allocator.allocated() >> 20), (130, 61)); // 9 MiB of the 40 are free
    assert!(allocator.allocate(5, 9 << 20).unwrap());
    assert_eq!(allocator.allocated() >> 20, 70);
}

#[test]
fn freed_neighbours_become_one() {
    let m = MIB as i64;
    let mut allocator = on(GIB, false);
    // three of 5 MiB in a segment of 20; the first two, freed, hold 10 again without more memory
    let found = course(&mut allocator, &[5 * m, 5 * m, 5 * m, 0, -1, 10 * m - 512]);
    assert_eq!(found.last().map(|found| found.0 >> 20), Some(20));
}

#[test]
fn fragmentation_is_what_segments_suffer_and_expandable_ones_do_not() {
    // growing requests, each freed before the next: a segment each, or one range that grows
    let steps: Vec<i64> = (0..8).flat_map(|k| [(40 + 8 * k) << 20, -k]).collect();
    let last = |expandable| course(&mut on(8 * GIB, expandable), &steps).last().copied().unwrap().0 >> 20;
    assert_eq!(last(false), (0..8).map(|k| 40 + 8 * k).sum::<u64>());
    assert_eq!(last(true), 100);
}

#[test]
fn a_full_device_gets_back_what_is_cached() {
    let m = MIB;
    for expandable in [false, true] {
        let mut allocator = on(100 * m, expandable);
        assert!(allocator.allocate(0, 60 * m).unwrap());
        allocator.free(0).unwrap();
        assert!(allocator.allocate(1, 80 * m).unwrap(), "{expandable}");
        assert_eq!(allocator.reserved() / m, 80);
        assert!(!allocator.allocate(2, 30 * m).unwrap());
    }
}

#[test]
fn nothing_takes_nothing_and_broken_traces_are_errors() {
    let mut allocator = on(GIB, false);
    assert!(allocator.allocate(0, 0).unwrap());
    assert_eq!(allocator.reserved(), 0);
    assert!(allocator.allocate(0, 1).is_err());
    allocator.free(0).unwrap();
    assert!(allocator.free(0).is_err());
    let events = [Event::Allocate { id: 0, bytes: 3 * GIB, category: 0 }];
    let found = reserved(&events, Device { capacity: GIB, expandable: false }).unwrap();
    assert_eq!(found, Reserved { bytes: 0, allocated: 0, out_of_memory: Some(0) });
}

impl Allocator {
    /// What must always hold.
    fn check(&self) {
        let (mut reserved, mut used) = (0, 0);
        for (index, segment) in self.segments.iter().enumerate() {
            let mut end = 0;
            let mut last = State::Used;
            for (&offset, block) in &segment.blocks {
                assert_eq!(offset, end, "blocks without gaps");
                assert!(block.size > 0 && block.size.is_multiple_of(ROUND));
                assert!(block.state == State::Used || block.state != last, "equal neighbours are joined");
                let place = (block.size, index, offset);
                let small = usize::from(segment.small);
                assert_eq!(self.free[small].contains(&place), block.state == State::Free);
                assert_eq!(self.unmapped[small].contains(&place), block.state == State::Unmapped);
                reserved += if block.state == State::Unmapped { 0 } else { block.size };
                used += if block.state == State::Used { block.size } else { 0 };
                (end, last) = (offset + block.size, block.state);
            }
        }
        assert_eq!((self.reserved, self.allocated), (reserved, used));
        let listed = self.free.iter().chain(&self.unmapped).map(BTreeSet::len).sum::<usize>();
        assert_eq!(listed + self.used.len(), self.segments.iter().map(|segment| segment.blocks.len()).sum::<usize>());
        assert!(self.reserved <= self.device.capacity);
    }
}

proptest! {
    #[test]
    fn any_course_keeps_its_books(
        steps in prop::collection::vec((0_u64..24, 1_u64..(70 << 20)), 0..160),
        small in any::<bool>(),
        expandable in any::<bool>(),
        mebibytes in 1_u64..400,
    ) {
        let mut allocator = on(mebibytes << 20, expandable);
        let mut living = BTreeSet::new();
        for (id, bytes) in steps {
            let bytes = if small { bytes >> 6 } else { bytes };
            if living.remove(&id) {
                allocator.free(id).unwrap();
            } else {
                let small = bytes.div_ceil(ROUND) * ROUND <= SMALL;
                let fitting = allocator.free[usize::from(small)].iter().any(|place| place.0 >= bytes);
                let before = allocator.reserved();
                if allocator.allocate(id, bytes).unwrap() {
                    living.insert(id);
                    prop_assert!(!fitting || allocator.reserved() == before, "what is free is used first");
                } else {
                    prop_assert!(!fitting);
                }
            }
            allocator.check();
        }
        for id in living {
            allocator.free(id).unwrap();
        }
        allocator.check();
        prop_assert_eq!(allocator.allocated(), 0);
        allocator.give_back();
        allocator.check();
        prop_assert_eq!(allocator.reserved(), 0);
    }
}
