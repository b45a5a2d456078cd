//! Where fields are in the running kernel's structures, from its BTF: nothing depends on an offset that is written down.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;
// Kinds of types, as `Documentation/bpf/btf.rst` of the kernel numbers them.
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;
const PTR: u32 = 2;
const FWD: u32 = 7;
const MODIFIERS: [u32; 5] = [TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG];

/// The kernel's types, as far as they are needed: structures, enumerations and what stands for them.
pub struct Btf<'b> {
    bytes: &'b [u8],
    strings: usize,
    /// Offsets of type records; the first type has number 1.
    types: Vec<usize>,
    by_name: HashMap<&'b [u8], usize>,
}

type Found<T> = Result<T, String>;

impl<'b> Btf<'b> {
    pub fn parse(bytes: &'b [u8]) -> Found<Self> {
        let word = |at: usize| read(bytes, at);
        if word(0)? & 0xffff != u32::from(MAGIC) {
            return Err("it is not BTF of this machine's byte order".into());
        }
        let header = word(4)? as usize;
        let (types_at, types_len) = (header + word(8)? as usize, word(12)? as usize);
        let strings = header + word(16)? as usize;
        let mut btf = Self { bytes, strings, types: Vec::new(), by_name: HashMap::new() };
        let mut at = types_at;
        while at < types_at + types_len {
            let index = btf.types.len();
            btf.types.push(at);
            let info = word(at + 4)?;
            if matches!(kind(info), STRUCT | ENUM) {
                btf.by_name.entry(btf.string(word(at)?)?).or_insert(index);
            }
            at += 12 + trailing(info)?;
        }
        Ok(btf)
    }

    /// The offset in bytes of a field of a structure, given as a path of member names: `["sk_backlog", "rmem_alloc"]`.
    /// Members of anonymous structures and unions count as the structure's own.
    pub fn offset(&self, structure: &str, path: &[&str]) -> Found<u32> {
        self.field(structure, path).map(|(offset, _)| offset)
    }

    /// The offset of a field likewise, and its size in bytes.
    pub fn field(&self, structure: &str, path: &[&str]) -> Found<(u32, u32)> {
        let mut at = *self.by_name.get(structure.as_bytes()).ok_or_else(|| format!("there is no struct {structure}"))?;
        let mut offset = 0;
        for name in path {
            let (bits, of) = self.member(at, name)?.ok_or_else(|| format!("struct {structure} has no {}", path.join(".")))?;
            offset += bits;
            at = self.resolve(of)?;
        }
        if offset % 8 != 0 {
            return Err(format!("{structure}.{} is a bit field", path.join(".")));
        }
        // Of a pointer there is none here, but its type.
        let size = self.types.get(at).map_or(Ok(0), |at| read(self.bytes, at + 8))?;
        Ok((offset / 8, size))
    }

    /// The number an enumeration gives to a name.
    pub fn enumerator(&self, enumeration: &str, name: &str) -> Found<u32> {
        let none = || format!("there is no {name} in enum {enumeration}");
        let at = self.by_name.get(enumeration.as_bytes()).and_then(|index| self.types.get(*index)).ok_or_else(none)?;
        let info = read(self.bytes, at + 4)?;
        for i in 0..(info & 0xffff) as usize {
            let one = at + 12 + i * 8;
            if kind(info) == ENUM && self.string(read(self.bytes, one)?)? == name.as_bytes() {
                return read(self.bytes, one + 4);
            }
        }
        Err(none())
    }

    /// A member's offset in bits, and its type's number.
    fn member(&self, index: usize, name: &str) -> Found<Option<(u32, u32)>> {
        let at = *self.types.get(index).ok_or("a type is missing")?;
        let info = read(self.bytes, at + 4)?;
        if !matches!(kind(info), STRUCT | UNION) {
            return Ok(None);
        }
        for i in 0..(info & 0xffff) as usize {
            let member = at + 12 + i * 12;
            let (own_name, of, offset) = (read(self.bytes, member)?, read(self.bytes, member + 4)?, read(self.bytes, member + 8)?);
            // With the flag set, the upper byte is the size of a bit field.
            let bits = if info >> 31 == 1 { offset & 0x00ff_ffff } else { offset };
            if own_name == 0 {
                if let Some((inner, of)) = self.member(self.resolve(of)?, name)? {
                    return Ok(Some((bits + inner, of)));
                }
            } else if self.string(own_name)? == name.as_bytes() {
                return Ok(Some((bits, of)));
            }
        }
        Ok(None)
    }

    /// The index of a type, behind typedefs and qualifiers.
    fn resolve(&self, number: u32) -> Found<usize> {
        let mut number = number;
        for _ in 0..32 {
            let index = (number as usize).checked_sub(1).ok_or("a member has no type")?;
            let at = *self.types.get(index).ok_or("a type is missing")?;
            if !MODIFIERS.contains(&kind(read(self.bytes, at + 4)?)) {
                return Ok(index);
            }
            number = read(self.bytes, at + 8)?;
        }
        Err("typedefs without end".into())
    }

    fn string(&self, offset: u32) -> Found<&'b [u8]> {
        let from = self.bytes.get(self.strings + offset as usize..).ok_or("a name is missing")?;
        from.split(|b| *b == 0).next().ok_or_else(|| "a name has no end".to_owned())
    }
}

fn kind(info: u32) -> u32 {
    (info >> 24) & 0x1f
}

/// Bytes that follow a type's first twelve.
fn trailing(info: u32) -> Found<usize> {
    let n = (info & 0xffff) as usize;
    Ok(match kind(info) {
        INT | VAR | DECL_TAG => 4,
        PTR | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC | FLOAT | TYPE_TAG => 0,
        ARRAY => 12,
        STRUCT | UNION | DATASEC | ENUM64 => n * 12,
        ENUM | FUNC_PROTO => n * 8,
        other => return Err(format!("it has a kind of type this program does not know ({other})")),
    })
}

fn read(bytes: &[u8], at: usize) -> Found<u32> {
    let word = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    word.map(u32::from_ne_bytes).ok_or_else(|| "it ends early".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernels_fields_are_found_and_others_are_named() {
        let bytes = std::fs::read("/sys/kernel/btf/vmlinux").expect("BTF");
        let btf = Btf::parse(&bytes).expect("parses");
        assert_eq!(btf.offset("tcp_sock", &["inet_conn", "icsk_inet", "sk", "__sk_common"]), Ok(0));
        let backlog = btf.offset("sock", &["sk_backlog"]).expect("found");
        assert!(btf.offset("sock", &["sk_backlog", "rmem_alloc"]).expect("found") >= backlog);
        // Through anonymous unions and structures.
        assert!(btf.offset("sock", &["__sk_common", "skc_daddr"]).is_ok());
        assert_eq!(btf.field("sock", &["sk_backlog", "rmem_alloc", "counter"]).map(|(_, size)| size), Ok(4));
        assert_eq!(btf.enumerator("sock_flags", "SOCK_DEAD"), Ok(0));
        assert!(btf.enumerator("sock_flags", "SOCK_ZEROCOPY").is_ok_and(|bit| bit > 0 && bit < 64));
        assert!(btf.enumerator("sock_flags", "NO_SUCH").is_err() && btf.enumerator("sock", "NO_SUCH").is_err());
        assert_eq!(btf.offset("sock", &["no_such"]), Err("struct sock has no no_such".into()));
        assert_eq!(btf.offset("no_such", &["x"]), Err("there is no struct no_such".into()));
        for cut in [0, 3, 23, 24, 100, 5000] {
            assert!(Btf::parse(&bytes[..cut]).is_err(), "{cut}");
        }
        assert!(Btf::parse(&[0; 64]).is_err());
    }
}
