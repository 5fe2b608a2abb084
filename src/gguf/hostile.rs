//! GGUF files from strangers: whatever the bytes, opening ends soon, in an error or a file, and allocates in proportion to
//! the bytes that are there.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Array, Declared, File, Value, Writer};
use crate::error::{Error, ErrorKind};
use crate::quant::Kind;
use proptest::prelude::*;

/// The system's allocator, counting what each thread asks for.
struct Counting;

thread_local! {
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ASKED.try_with(|asked| asked.set(asked.get().saturating_add(layout.size())));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn open(bytes: &[u8]) -> Result<File, Error> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    File::open(file.path())
}

/// A file with metadata of every type and tensors of several formats.
fn valid() -> Vec<u8> {
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("u8", Value::U8(1)),
        ("i16", Value::I16(-2)),
        ("f32", Value::F32(0.5)),
        ("f64", Value::F64(0.25)),
        ("u64", Value::U64(7)),
        ("bool", Value::Bool(true)),
        ("strings", Value::Array(Array::String(vec!["a".into(), String::new(), "grüß".into()]))),
        ("numbers", Value::Array(Array::I32(vec![1, -2, 3]))),
        ("truths", Value::Array(Array::Bool(vec![true, false]))),
        ("nested", Value::Array(Array::Array(vec![Array::U16(vec![1]), Array::U16(vec![])]))),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let tensors = [("ta", vec![3, 32], Kind::Q4_0), ("tb", vec![5], Kind::F32), ("tc", vec![2, 256], Kind::Q6K)]
        .map(|(name, shape, kind)| Declared { name: name.into(), shape, kind });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("valid.gguf");
    let mut writer = Writer::create(&path, false, &metadata, &tensors).unwrap();
    for tensor in &tensors {
        writer.write(&tensor.name, &vec![7; tensor.nbytes().unwrap()]).unwrap();
    }
    writer.finish().unwrap();
    let file = File::open(&path).unwrap();
    assert!(file.metadata().iter().map(|(key, value)| (key.to_owned(), value.clone())).eq(metadata));
    assert!(file.tensors().iter().all(|tensor| file.data(tensor).iter().all(|&byte| byte == 7)));
    std::fs::read(&path).unwrap()
}

/// Where `pattern` stands in `bytes`.
fn find(bytes: &[u8], pattern: &[u8]) -> usize {
    bytes.windows(pattern.len()).position(|window| window == pattern).unwrap()
}

/// `bytes` with `new` written over what is at `at`.
fn overwritten(mut bytes: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

/// The end of a key's name in the metadata: there its type stands.
fn after_key(bytes: &[u8], key: &str) -> usize {
    let mut pattern = (key.len() as u64).to_le_bytes().to_vec();
    pattern.extend(key.as_bytes());
    find(bytes, &pattern) + pattern.len()
}

fn refusal(bytes: &[u8]) -> String {
    let error = open(bytes).expect_err("expected a refusal");
    assert_eq!(error.kind, ErrorKind::Input);
    error.to_string()
}

#[test]
fn every_attack_is_refused_by_name_and_values() {
    let valid = valid();
    let over = |at: usize, new: &[u8]| overwritten(valid.clone(), at, new);
    let string = after_key(&valid, "general.architecture") + 4;
    let strings = after_key(&valid, "strings") + 4;
    let nested = after_key(&valid, "nested") + 4;
    // the entry of a tensor: name, u32 dimensions, u64 sizes, u32 type, u64 offset
    let (a, b, c) = (after_key(&valid, "ta"), after_key(&valid, "tb"), after_key(&valid, "tc"));
    let huge = (1u64 << 63).to_le_bytes();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "expected a GGUF file, got an empty file"),
        (b"GG".to_vec(), "magic: expected 4 bytes at offset 0, got 2"),
        (b"PK\x03\x04 a zip archive".to_vec(), "begins with \"GGUF\", got \"PK"),
        (over(4, &1u32.to_le_bytes()), "expected GGUF version 2 or 3, got 1"),
        (over(4, &3u32.to_be_bytes()), "expected little-endian GGUF, got big-endian (version 3)"),
        (over(8, &u64::MAX.to_le_bytes()), "number of tensors: expected at most"),
        (over(16, &u64::MAX.to_le_bytes()), "number of metadata entries: expected at most"),
        (over(24, &huge), "key of metadata entry 0: a string: expected 9223372036854775808 bytes at offset 32"),
        (over(string, &huge), "general.architecture: a string: expected 9223372036854775808 bytes"),
        (over(string + 8, &[0xff]), "general.architecture: expected UTF-8, got invalid utf-8"),
        (over(after_key(&valid, "u8"), &99u32.to_le_bytes()), "\"u8\": expected a value type from 0 to 12, got 99"),
        (over(after_key(&valid, "bool") + 4, &[2]), "\"bool\": expected 0 or 1 for a boolean, got 2"),
        (over(strings + 4, &(1u64 << 61).to_le_bytes()), "strings: expected at most"),
        (over(nested, &13u32.to_le_bytes()), "\"nested\": expected a value type from 0 to 12, got 13"),
        (over(a, &5u32.to_le_bytes()), "tensor \"ta\": expected at most 4 dimensions, got 5"),
        (over(a + 4, &31u64.to_le_bytes()), "tensor \"ta\": expected rows of a multiple of 32 values for q4_0, got 31"),
        (
            over(a + 12, &huge),
            "tensor \"ta\": expected a size below 2^63 bytes, got the dimensions [32, 9223372036854775808]",
        ),
        (over(a + 12, &(1u64 << 40).to_le_bytes()), "tensor \"ta\": expected its 19791209299968 bytes inside the file"),
        (over(a + 20, &16u32.to_le_bytes()), "got type 16 (iq2_xxs)"),
        (over(a + 20, &4_000_000_000u32.to_le_bytes()), "got type 4000000000"),
        (over(b + 16, &33u64.to_le_bytes()), "tensor \"tb\": expected an offset that is a multiple of 32, got 33"),
        (over(b + 16, &(u64::MAX - 31).to_le_bytes()), "tensor \"tb\": expected its 20 bytes inside the file"),
        (over(b + 16, &0u64.to_le_bytes()), "tensors \"ta\" and \"tb\": expected bytes of their own, got overlapping"),
        (over(c - 1, b"a"), "tensor \"ta\": expected the name once, got it twice"),
        (over(after_key(&valid, "f64") - 3, b"f32"), "metadata \"f32\": expected the key once, got it twice"),
        (valid[..valid.len() - 200].to_vec(), "tensor \"tc\": expected its 420 bytes inside the file"),
    ];
    for (bytes, expected) in cases {
        let message = refusal(&bytes);
        assert!(message.contains(expected), "expected {expected:?}, got {message:?}");
    }
}

#[test]
fn metadata_that_steers_the_reader_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("steering.gguf");
    let refused = |key: &str, value: Value| {
        let mut bytes = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        bytes.extend((key.len() as u64).to_le_bytes());
        bytes.extend(key.as_bytes());
        match value {
            Value::U32(number) => {
                bytes.extend(4u32.to_le_bytes());
                bytes.extend(number.to_le_bytes());
            }
            _ => bytes.extend([7, 0, 0, 0, 1]),
        }
        std::fs::write(&path, bytes).unwrap();
        File::open(&path).expect_err("expected a refusal").message
    };
    let zero = refused("general.alignment", Value::U32(0));
    assert!(zero.contains("\"general.alignment\": expected a power of two, got 0"), "{zero}");
    let odd = refused("general.alignment", Value::U32(48));
    assert!(odd.contains("expected a power of two, got 48"), "{odd}");
    let typed = refused("general.alignment", Value::Bool(true));
    assert!(typed.contains("expected an integer of 32 bits, not negative, got bool"), "{typed}");
    let split = refused("split.count", Value::U32(3));
    assert!(split.contains("got one of 3 parts"), "{split}");
}

#[test]
fn arrays_cannot_be_nested_until_the_stack_ends() {
    let mut bytes = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0k\x09\0\0\0".to_vec();
    for _ in 0..1_000_000 {
        bytes.extend(b"\x09\0\0\0\x01\0\0\0\0\0\0\0");
    }
    assert!(refusal(&bytes).contains("metadata \"k\": expected arrays nested at most 4 deep, got more"));
}

#[test]
fn what_is_not_a_file_is_refused() {
    for (path, expected) in
        [("/", "got a directory"), ("/dev/zero", "got a directory or device"), ("/no/file", "no such file")]
    {
        let message = File::open(Path::new(path)).expect_err("expected a refusal").to_string();
        assert!(message.contains(expected), "{message}");
    }
}

/// A change to a file.
#[derive(Clone, Debug)]
enum Change {
    Byte(usize, u8),
    Number(usize, u64),
    Short(usize, u32),
    Cut(usize),
    Repeat(usize, usize),
    Remove(usize, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let number = prop_oneof![
        any::<u64>(),
        (0u32..64).prop_map(|shift| 1 << shift),
        (0u32..64).prop_map(|shift| u64::MAX << shift),
        0u64..300
    ];
    prop_oneof![
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (any::<usize>(), number).prop_map(|(at, number)| Change::Number(at, number)),
        (any::<usize>(), 0u32..40).prop_map(|(at, number)| Change::Short(at, number)),
        any::<usize>().prop_map(Change::Cut),
        (any::<usize>(), 1usize..64).prop_map(|(at, count)| Change::Repeat(at, count)),
        (any::<usize>(), 1usize..64).prop_map(|(at, count)| Change::Remove(at, count)),
    ]
}

fn apply(mut bytes: Vec<u8>, change: &Change) -> Vec<u8> {
    let length = bytes.len().max(1);
    let mut put = |at: usize, new: &[u8]| {
        for (byte, new) in bytes.iter_mut().skip(at % length).zip(new) {
            *byte = *new;
        }
    };
    match *change {
        Change::Byte(at, byte) => put(at, &[byte]),
        Change::Number(at, number) => put(at, &number.to_le_bytes()),
        Change::Short(at, number) => put(at, &number.to_le_bytes()),
        Change::Cut(at) => bytes.truncate(at % length),
        Change::Repeat(at, count) => {
            let from = at % length;
            let piece: Vec<u8> = bytes.iter().skip(from).take(count).copied().collect();
            bytes.splice(from..from, piece);
        }
        Change::Remove(at, count) => {
            let from = (at % length).min(bytes.len());
            bytes.drain(from..(from + count).min(bytes.len()));
        }
    }
    bytes
}

fn survives(bytes: &[u8]) {
    let start = Instant::now();
    ASKED.with(|asked| asked.set(0));
    if let Ok(file) = open(bytes) {
        for tensor in file.tensors() {
            assert_eq!(file.data(tensor).len(), tensor.nbytes);
            let mut values = vec![0.0; tensor.len()];
            tensor.kind.dequantize(file.data(tensor), &mut values);
        }
    }
    let asked = ASKED.with(Cell::get);
    // strings and arrays of them take several times their bytes, and growing vectors ask again; messages are short
    assert!(asked < 40 * bytes.len() + 100_000, "asked for {asked} bytes to read a file of {}", bytes.len());
    assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_mutation_of_a_file_brings_the_reader_down(changes in prop::collection::vec(change(), 1..6)) {
        thread_local! { static VALID: Vec<u8> = valid(); }
        survives(&VALID.with(|valid| changes.iter().fold(valid.clone(), apply)));
    }

    #[test]
    fn no_bytes_at_all_bring_the_reader_down(tail in prop::collection::vec(any::<u8>(), 0..400), counts in any::<[u8; 2]>()) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(u64::from(counts[0] % 8).to_le_bytes());
        bytes.extend(u64::from(counts[1] % 8).to_le_bytes());
        bytes.extend(tail);
        survives(&bytes);
    }
}
