//! The check that the pages of a listing lead forward.

use std::collections::HashSet;

use crate::plural::counted;

/// Most pages in a row without an entry. S3 may send a few where many objects were removed.
const MOST_EMPTY_PAGES: u32 = 1000;

/// Most bytes of the names of one listing, with [`ENTRY_BYTES`] for each entry.
const MOST_BYTES: u64 = 1 << 29;
/// Bytes that an entry counts besides its name: about four million entries are read.
const ENTRY_BYTES: u64 = 64;

/// The pages of one listing so far.
#[derive(Debug, Default)]
pub(crate) struct Paging {
    /// Where each page began: its token or marker.
    places: HashSet<String>,
    empty_pages: u32,
    entries: u64,
    /// Bytes of the places and of the entries' names, with [`ENTRY_BYTES`] for each.
    bytes: u64,
}

impl Paging {
    /// Counts an entry.
    ///
    /// # Errors
    /// The fault, if the listing is too long.
    pub(crate) fn count(&mut self, name: &str) -> Result<(), String> {
        self.entries += 1;
        self.add(name)
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        self.bytes += ENTRY_BYTES + text.len() as u64;
        if self.bytes <= MOST_BYTES {
            return Ok(());
        }
        Err(format!(
            "it goes on after {} with more than {MOST_BYTES} bytes of names",
            counted(self.entries, "entry")
        ))
    }

    /// Takes a page of `sent` entries, `new` of them on no page before, that is followed by a page from
    /// `place` on.
    ///
    /// # Errors
    /// The fault, if the listing would not end or the server has lost its place.
    pub(crate) fn advance(&mut self, place: String, sent: usize, new: usize) -> Result<(), String> {
        if self.places.contains(&place) {
            return Err(format!("it comes back to the page from {place:?} on"));
        }
        if sent > 0 && new == 0 {
            return Err(format!(
                "the page before {place:?} repeats entries of earlier pages and has no new one"
            ));
        }
        self.empty_pages = if sent == 0 { self.empty_pages + 1 } else { 0 };
        if self.empty_pages >= MOST_EMPTY_PAGES {
            return Err(format!(
                "{MOST_EMPTY_PAGES} pages in a row are empty, and it goes on"
            ));
        }
        self.add(&place)?;
        self.places.insert(place);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paging_accepts_what_leads_forward() {
        let mut paging = Paging::default();
        for page in 0..5000 {
            paging.advance(format!("{page}"), 3, 1).unwrap();
        }
        for page in 0..MOST_EMPTY_PAGES - 1 {
            paging.advance(format!("empty {page}"), 0, 0).unwrap();
        }
        paging.advance("full".to_owned(), 1, 1).unwrap();
        paging.advance("next".to_owned(), 0, 0).unwrap();
    }

    #[test]
    fn paging_refuses_what_never_ends() {
        let mut paging = Paging::default();
        paging.advance("a".to_owned(), 2, 2).unwrap();
        paging.advance("b".to_owned(), 2, 2).unwrap();
        let cycle = paging.advance("a".to_owned(), 2, 2).unwrap_err();
        assert!(cycle.contains("comes back"), "{cycle}");
        let repeated = paging.advance("c".to_owned(), 2, 0).unwrap_err();
        assert!(repeated.contains("no new one"), "{repeated}");
        let endless = (0..).find_map(|page| paging.count(&format!("{page:0100}")).err());
        let endless = endless.unwrap();
        assert!(endless.starts_with("it goes on after 32"), "{endless}");
        let mut paging = Paging::default();
        let empty = (0..).find_map(|page| paging.advance(format!("{page}"), 0, 0).err());
        assert!(empty.unwrap().contains("are empty"));
    }
}
