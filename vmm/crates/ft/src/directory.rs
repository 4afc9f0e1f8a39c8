//! The arbiter that is a directory on shared storage, as steps without I/O (R14).
//!
//! One file for each epoch, `epoch-` and twenty digits, made by writing a temporary file, syncing
//! it, and linking it to its name: link(2) fails where the name exists, also across hosts. After
//! *any* error the name is read back, and the nonce in it says whose it is. The directory is synced
//! before a win is believed, also one that was found by reading back. Nothing is ever deleted but
//! temporary files. A marker file tells the directory from an empty mount point.
//!
//! [`DirectoryCall::step`] is fed the result of each operation and says the next. The driver does
//! them on a thread of its own, so that a hung mount hangs nothing else.

use format::Epoch;

use crate::arbiter::{ArbiterReply, ArbiterRequest, Base, CallId};
use crate::canary::{self, Canary};
use crate::names::HostId;
use crate::record::EpochRecord;

/// The file whose presence says that the directory is one of epoch records.
pub const MARKER: &str = "pollux-epochs";

/// An operation on the directory. Names are plain, without a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileOp {
    /// List all names.
    List,
    /// Read the whole file.
    Read(String),
    /// Make the file, which does not exist, with this content.
    Create(String, Vec<u8>),
    /// fsync the file.
    SyncFile(String),
    /// link(2): give the first the second as another name.
    Link(String, String),
    /// fsync the directory.
    SyncDirectory,
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileResult {
    /// Done.
    Done,
    /// The names.
    Names(Vec<String>),
    /// The content.
    Content(Vec<u8>),
    /// ENOENT.
    NotFound,
    /// EEXIST.
    Exists,
    /// Anything else, also where it is unknown whether it was done.
    Failed(String),
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectoryStep {
    /// Do this and pass its result to [`DirectoryCall::step`].
    Do(FileOp),
    /// The call is answered. The temporary file may be removed at leisure.
    Answer {
        /// The answer.
        reply: ArbiterReply,
        /// The name of the temporary file, where one was made.
        leftover: Option<String>,
    },
}

/// The name of an epoch's record.
#[must_use]
pub fn record_name(epoch: Epoch) -> String {
    format!("epoch-{:020}", epoch.0)
}

/// The epoch that a name belongs to, if it is a record's.
#[must_use]
pub fn record_epoch(name: &str) -> Option<Epoch> {
    let digits = name.strip_prefix("epoch-")?;
    let number = digits.parse().ok().map(Epoch)?;
    (record_name(number) == name).then_some(number)
}

/// The prefix of the temporary files of `host`: those that are left over may be removed when the
/// host's only arbiter starts.
#[must_use]
pub fn temporary_prefix(host: HostId) -> String {
    format!(".claim-{host}@")
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum At {
    Start,
    NewestListed,
    NewestRead,
    BaseListed,
    BaseRead(Base),
    Created,
    FileSynced,
    Linked,
    ReadBack,
    DirectorySynced,
}

/// One call to the directory arbiter.
#[derive(Debug)]
pub struct DirectoryCall {
    at: At,
    base: Option<Base>,
    record: Option<EpochRecord>,
    temporary: String,
    made: bool,
}

impl DirectoryCall {
    /// Begins a call of `host`. An attempt that is made again is another call, with another
    /// temporary file: what the earlier one left may be torn.
    #[must_use]
    pub fn new(host: HostId, call: CallId, request: ArbiterRequest) -> Self {
        let (base, record) = match request {
            ArbiterRequest::Newest => (None, None),
            ArbiterRequest::TryWin { base, record } => (base, Some(record)),
        };
        let nonce = record.as_ref().map(|record| record.nonce);
        Self {
            at: At::Start,
            base,
            record,
            temporary: format!(
                "{}{}-{}",
                temporary_prefix(host),
                nonce.unwrap_or_default(),
                call.0
            ),
            made: false,
        }
    }

    /// The next step, given the result of the one before; `None` before the first.
    pub fn step(&mut self, result: Option<FileResult>) -> DirectoryStep {
        let result = result.unwrap_or(FileResult::Done);
        match self.at.clone() {
            At::Start => self.start(),
            At::NewestListed => self.newest_listed(result),
            At::NewestRead => match read_record(result) {
                Ok(Some(record)) => self.answer(ArbiterReply::Newest(Some(record))),
                Ok(None) => self.unreachable("a record that was listed is not there"),
                Err(why) => self.unreachable(&why),
            },
            At::BaseListed => self.base_listed(result),
            At::BaseRead(base) => self.base_read(base, result),
            At::Created => self.created(result),
            At::FileSynced => match result {
                FileResult::Done => self.link(),
                other => self.failed("sync of the record", other),
            },
            At::Linked => self.linked(result),
            At::ReadBack => self.read_back(result),
            At::DirectorySynced => match result {
                FileResult::Done => self.answer(ArbiterReply::Won),
                other => self.failed("sync of the directory", other),
            },
        }
    }

    fn start(&mut self) -> DirectoryStep {
        match (&self.record, self.base) {
            (None, _) => self.go(At::NewestListed, FileOp::List),
            (Some(_), None) => self.go(At::BaseListed, FileOp::List),
            (Some(_), Some(_)) if canary::on(Canary::RecordPruned) => self.create(),
            (Some(_), Some(base)) => {
                let name = record_name(base.epoch);
                self.go(At::BaseRead(base), FileOp::Read(name))
            }
        }
    }

    fn newest_listed(&mut self, result: FileResult) -> DirectoryStep {
        match newest_of(result) {
            Ok(Some(epoch)) => self.go(At::NewestRead, FileOp::Read(record_name(epoch))),
            Ok(None) => self.answer(ArbiterReply::Newest(None)),
            Err(why) => self.unreachable(&why),
        }
    }

    fn base_listed(&mut self, result: FileResult) -> DirectoryStep {
        match newest_of(result) {
            Ok(None) => self.create(),
            // The claim is built on there being none: its epoch is taken, reading back says by whom.
            Ok(Some(_)) => self.look(),
            Err(why) => self.unreachable(&why),
        }
    }

    fn base_read(&mut self, base: Base, result: FileResult) -> DirectoryStep {
        match read_record(result) {
            Ok(Some(record)) if record.nonce == base.nonce => self.create(),
            Ok(_) => {
                self.unreachable("the record before this one is not there: another directory?")
            }
            Err(why) => self.unreachable(&why),
        }
    }

    fn create(&mut self) -> DirectoryStep {
        let bytes = self.claimed().encode();
        let name = self.temporary.clone();
        self.go(At::Created, FileOp::Create(name, bytes))
    }

    fn created(&mut self, result: FileResult) -> DirectoryStep {
        self.made = true;
        match result {
            FileResult::Done if canary::on(Canary::LinkBeforeSync) => self.link(),
            FileResult::Done => {
                let name = self.temporary.clone();
                self.go(At::FileSynced, FileOp::SyncFile(name))
            }
            other => self.failed("writing the record", other),
        }
    }

    fn link(&mut self) -> DirectoryStep {
        let name = record_name(self.claimed().epoch);
        let from = self.temporary.clone();
        self.go(At::Linked, FileOp::Link(from, name))
    }

    fn linked(&mut self, result: FileResult) -> DirectoryStep {
        match result {
            FileResult::Done => self.go(At::DirectorySynced, FileOp::SyncDirectory),
            _ if canary::on(Canary::UnreachableIsWon) => self.answer(ArbiterReply::Won),
            _ => self.look(),
        }
    }

    fn look(&mut self) -> DirectoryStep {
        let name = record_name(self.claimed().epoch);
        self.go(At::ReadBack, FileOp::Read(name))
    }

    fn read_back(&mut self, result: FileResult) -> DirectoryStep {
        match read_record(result) {
            Ok(Some(found))
                if found.nonce == self.claimed().nonce && !canary::on(Canary::ExistsIsLost) =>
            {
                self.go(At::DirectorySynced, FileOp::SyncDirectory)
            }
            Ok(Some(found)) => self.answer(ArbiterReply::Taken(found)),
            Ok(None) => self.unreachable("the link failed"),
            Err(why) => self.unreachable(&why),
        }
    }

    fn claimed(&self) -> &EpochRecord {
        self.record
            .as_ref()
            .expect("only a claim takes these steps")
    }

    fn go(&mut self, at: At, op: FileOp) -> DirectoryStep {
        self.at = at;
        DirectoryStep::Do(op)
    }

    fn failed(&mut self, what: &str, result: FileResult) -> DirectoryStep {
        if canary::on(Canary::UnreachableIsWon) {
            return self.answer(ArbiterReply::Won);
        }
        let why = match result {
            FileResult::Failed(why) => why,
            FileResult::Exists => "it exists".to_owned(),
            FileResult::NotFound => "not found".to_owned(),
            _ => "a result that does not fit".to_owned(),
        };
        self.unreachable(&format!("{what}: {why}"))
    }

    fn unreachable(&mut self, why: &str) -> DirectoryStep {
        self.answer(ArbiterReply::Unreachable(why.to_owned()))
    }

    fn answer(&mut self, reply: ArbiterReply) -> DirectoryStep {
        DirectoryStep::Answer {
            reply,
            leftover: self.made.then(|| self.temporary.clone()),
        }
    }
}

fn newest_of(result: FileResult) -> Result<Option<Epoch>, String> {
    match result {
        FileResult::Names(names) if names.iter().any(|name| name == MARKER) => {
            Ok(names.iter().filter_map(|name| record_epoch(name)).max())
        }
        FileResult::Names(_) => Err(format!(
            "no {MARKER} there: the storage is not mounted, or was never made ready with `pollux init`"
        )),
        FileResult::Failed(why) => Err(why),
        _ => Err("the directory is not there".to_owned()),
    }
}

fn read_record(result: FileResult) -> Result<Option<EpochRecord>, String> {
    match result {
        FileResult::Content(bytes) => EpochRecord::decode(&bytes)
            .map(Some)
            .map_err(|error| format!("record: {error}")),
        FileResult::NotFound => Ok(None),
        FileResult::Failed(why) => Err(why),
        _ => Err("a result that does not fit".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use format::SessionId;

    use super::*;
    use crate::names::Nonce;
    use crate::quarantine::Quarantine;
    use crate::record::Tenure;

    /// A directory whose operations fail on demand, before or after they took effect.
    #[derive(Default)]
    struct Directory {
        files: BTreeMap<String, Vec<u8>>,
        fail: Option<(usize, bool)>,
        done: usize,
    }

    impl Directory {
        fn marked() -> Self {
            let mut directory = Self::default();
            directory.files.insert(MARKER.to_owned(), vec![]);
            directory
        }

        fn apply(&mut self, op: &FileOp) -> FileResult {
            self.done += 1;
            match self.fail {
                Some((at, false)) if at == self.done => FileResult::Failed("lost".to_owned()),
                Some((at, true)) if at == self.done => {
                    self.really(op);
                    FileResult::Failed("reply lost".to_owned())
                }
                _ => self.really(op),
            }
        }

        fn really(&mut self, op: &FileOp) -> FileResult {
            match op {
                FileOp::List => FileResult::Names(self.files.keys().cloned().collect()),
                FileOp::Read(name) => match self.files.get(name) {
                    Some(bytes) => FileResult::Content(bytes.clone()),
                    None => FileResult::NotFound,
                },
                FileOp::Create(name, bytes) => {
                    self.files.insert(name.clone(), bytes.clone());
                    FileResult::Done
                }
                FileOp::Link(from, to) => {
                    if self.files.contains_key(to) {
                        return FileResult::Exists;
                    }
                    let bytes = self.files[from].clone();
                    self.files.insert(to.clone(), bytes);
                    FileResult::Done
                }
                FileOp::SyncFile(_) | FileOp::SyncDirectory => FileResult::Done,
            }
        }

        fn call(&mut self, id: u64, request: ArbiterRequest) -> (ArbiterReply, Vec<FileOp>) {
            let mut call = DirectoryCall::new(host("castor"), CallId(id), request);
            let mut ops = Vec::new();
            let mut result = None;
            loop {
                match call.step(result) {
                    DirectoryStep::Do(op) => {
                        result = Some(self.apply(&op));
                        ops.push(op);
                    }
                    DirectoryStep::Answer { reply, .. } => return (reply, ops),
                }
            }
        }
    }

    fn host(name: &str) -> HostId {
        name.parse().unwrap()
    }

    fn record(epoch: u64, nonce: u8) -> EpochRecord {
        EpochRecord {
            epoch: Epoch(epoch),
            nonce: Nonce([nonce; 16]),
            owner: host("castor"),
            tenure: Tenure::Pair {
                backup: host("pollux"),
                session: SessionId([1; 16]),
            },
            quarantine: Quarantine::default(),
        }
    }

    fn claim(epoch: u64, nonce: u8, base: u8) -> ArbiterRequest {
        ArbiterRequest::TryWin {
            base: (epoch > 1).then(|| Base {
                epoch: Epoch(epoch - 1),
                nonce: Nonce([base; 16]),
            }),
            record: record(epoch, nonce),
        }
    }

    #[test]
    fn a_record_is_synced_before_it_is_linked_and_the_directory_before_it_is_won() {
        let mut directory = Directory::marked();
        let (reply, ops) = directory.call(1, claim(1, 1, 0));
        assert_eq!(reply, ArbiterReply::Won);
        let kinds: Vec<_> = ops
            .iter()
            .map(|op| match op {
                FileOp::List => "list",
                FileOp::Read(_) => "read",
                FileOp::Create(..) => "create",
                FileOp::SyncFile(_) => "sync",
                FileOp::Link(..) => "link",
                FileOp::SyncDirectory => "sync directory",
            })
            .collect();
        assert_eq!(kinds, ["list", "create", "sync", "link", "sync directory"]);
        let newest = directory.call(2, ArbiterRequest::Newest).0;
        assert_eq!(newest, ArbiterReply::Newest(Some(record(1, 1))));
    }

    #[test]
    fn the_second_of_two_claims_is_told_who_won() {
        let mut directory = Directory::marked();
        assert_eq!(directory.call(1, claim(1, 1, 0)).0, ArbiterReply::Won);
        assert_eq!(directory.call(2, claim(2, 2, 1)).0, ArbiterReply::Won);
        let taken = ArbiterReply::Taken(record(2, 2));
        assert_eq!(directory.call(3, claim(2, 3, 1)).0, taken);
        let taken = ArbiterReply::Taken(record(1, 1));
        assert_eq!(directory.call(4, claim(1, 9, 0)).0, taken);
    }

    /// Each operation fails once, with and without having been done; the claim is made again until
    /// it is answered. It must be won, and never believed to be lost.
    #[test]
    fn any_single_error_is_survived_by_asking_again() {
        for done in [false, true] {
            for at in 1..=5 {
                let mut directory = Directory::marked();
                directory.call(1, claim(1, 1, 0));
                (directory.fail, directory.done) = (Some((at, done)), 0);
                let mut replies = Vec::new();
                for id in 2..5 {
                    replies.push(directory.call(id, claim(2, 2, 1)).0);
                }
                let won = replies.iter().position(|reply| *reply == ArbiterReply::Won);
                assert!(
                    won.is_some_and(|tries| tries <= 1),
                    "{at} {done}: {replies:?}"
                );
                assert!(!replies.iter().any(|r| matches!(r, ArbiterReply::Taken(_))));
            }
        }
    }

    #[test]
    fn an_empty_mount_point_or_another_directory_is_unreachable_not_won() {
        let mut empty = Directory::default();
        let unreachable = |reply| matches!(reply, ArbiterReply::Unreachable(_));
        assert!(unreachable(empty.call(1, ArbiterRequest::Newest).0));
        assert!(unreachable(empty.call(1, claim(1, 1, 0)).0));
        assert!(unreachable(empty.call(1, claim(2, 1, 1)).0));
        let mut other = Directory::marked();
        other.call(1, claim(1, 7, 0));
        assert!(unreachable(other.call(1, claim(2, 1, 1)).0));
    }

    #[test]
    fn a_torn_record_is_unreachable_not_absent() {
        let mut directory = Directory::marked();
        directory.call(1, claim(1, 1, 0));
        let bytes = record(2, 2).encode();
        let torn = bytes[..bytes.len() - 3].to_vec();
        directory.files.insert(record_name(Epoch(2)), torn);
        for request in [ArbiterRequest::Newest, claim(2, 3, 1)] {
            let reply = directory.call(2, request).0;
            assert!(matches!(reply, ArbiterReply::Unreachable(_)), "{reply:?}");
        }
    }

    #[test]
    fn names_of_records_sort_and_parse_and_nothing_else_does() {
        assert_eq!(record_name(Epoch(12)), "epoch-00000000000000000012");
        assert_eq!(record_epoch("epoch-00000000000000000012"), Some(Epoch(12)));
        for other in ["epoch-12", "epoch-", "epoch-0000000000000000001x", MARKER] {
            assert_eq!(record_epoch(other), None);
        }
    }
}
