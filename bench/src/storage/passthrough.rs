//! The file system itself: every request is done on the directory behind it, under the name that the inode was
//! last looked up by. Only what VMMs need of a file system is there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::gate::Gate;
use super::ledger::{Ledger, lock};
use crate::Failure;
use crate::stage::SiteId;

/// Nothing that one host knows of a file stays true.
const TTL: Duration = Duration::ZERO;

/// What all requests of a mount share.
struct Shared {
    id: SiteId,
    root: PathBuf,
    names: Mutex<BTreeMap<u64, PathBuf>>,
    files: Mutex<BTreeMap<u64, Arc<File>>>,
    next_file: AtomicU64,
    ledger: Arc<Mutex<Ledger>>,
}

/// See the module.
pub(super) struct Passthrough {
    shared: Arc<Shared>,
    gate: Arc<Gate>,
}

impl Passthrough {
    pub(super) fn new(
        id: SiteId,
        root: &Path,
        gate: Arc<Gate>,
        ledger: Arc<Mutex<Ledger>>,
    ) -> Result<Self, Failure> {
        let root = root.canonicalize()?;
        let names = BTreeMap::from([(INodeNo::ROOT.0, root.clone())]);
        Ok(Self {
            shared: Arc::new(Shared {
                id,
                root,
                names: Mutex::new(names),
                files: Mutex::default(),
                next_file: AtomicU64::new(1),
                ledger,
            }),
            gate,
        })
    }

    /// Does a request when the storage is there.
    fn pass(&self, job: impl FnOnce(&Shared) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        self.gate.pass(move || job(&shared));
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn name(&self, ino: INodeNo) -> io::Result<PathBuf> {
        let name = held(&self.names).get(&ino.0).cloned();
        name.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    fn file(&self, handle: FileHandle) -> io::Result<Arc<File>> {
        let file = held(&self.files).get(&handle.0).cloned();
        file.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    fn keep(&self, file: File) -> FileHandle {
        let number = self.next_file.fetch_add(1, Ordering::Relaxed);
        held(&self.files).insert(number, Arc::new(file));
        FileHandle(number)
    }

    /// The name in the storage, for the ledger.
    fn inside(&self, name: &Path) -> PathBuf {
        Path::new("/").join(name.strip_prefix(&self.root).unwrap_or(name))
    }

    /// Looks at a file and remembers its name.
    fn look(&self, name: PathBuf) -> io::Result<FileAttr> {
        let meta = fs::symlink_metadata(&name)?;
        let ino = if name == self.root {
            INodeNo::ROOT.0
        } else {
            meta.ino()
        };
        held(&self.names).insert(ino, name);
        Ok(attributes(ino, &meta))
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.name(parent)?.join(name))
    }

    fn open(&self, name: &Path, flags: i32, create: Option<u32>) -> io::Result<FileHandle> {
        let mut options = OpenOptions::new();
        let access = flags & libc::O_ACCMODE;
        options
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY || create.is_some())
            // The kernel's own cache of the file is that of all hosts.
            .custom_flags(flags & (libc::O_DSYNC | libc::O_EXCL | libc::O_TRUNC));
        if let Some(mode) = create {
            options.create(true).mode(mode);
        }
        Ok(self.keep(options.open(name)?))
    }

    fn set(
        &self,
        ino: INodeNo,
        mode: Option<u32>,
        size: Option<u64>,
        mtime: Option<TimeOrNow>,
    ) -> io::Result<FileAttr> {
        let name = self.name(ino)?;
        if let Some(mode) = mode {
            fs::set_permissions(&name, fs::Permissions::from_mode(mode))?;
        }
        if size.is_some() || mtime.is_some() {
            let file = File::options().write(true).open(&name)?;
            if let Some(size) = size {
                file.set_len(size)?;
            }
            if let Some(time) = mtime {
                file.set_modified(match time {
                    TimeOrNow::SpecificTime(time) => time,
                    TimeOrNow::Now => SystemTime::now(),
                })?;
            }
        }
        self.look(name)
    }

    fn write(&self, ino: INodeNo, handle: FileHandle, at: u64, data: &[u8]) -> io::Result<u32> {
        self.file(handle)?.write_all_at(data, at)?;
        let name = self.inside(&self.name(ino)?);
        lock(&self.ledger).wrote(self.id, &name, at, data);
        Ok(data.len() as u32)
    }

    fn link(&self, ino: INodeNo, parent: INodeNo, new: &OsStr) -> io::Result<FileAttr> {
        let (old, new) = (self.name(ino)?, self.child(parent, new)?);
        // Written down in the order in which it happens.
        let mut ledger = lock(&self.ledger);
        fs::hard_link(old, &new)?;
        ledger.linked(self.id, &self.inside(&new));
        drop(ledger);
        self.look(new)
    }

    /// The inode is known by another name, if it has one left that was looked up.
    fn remove(&self, parent: INodeNo, name: &OsStr) -> io::Result<()> {
        fs::remove_file(self.child(parent, name)?)
    }

    fn list(&self, ino: INodeNo, from: u64, reply: &mut ReplyDirectory) -> io::Result<()> {
        let mut entries = vec![
            (ino, FileType::Directory, ".".into()),
            (ino, FileType::Directory, "..".into()),
        ];
        for entry in fs::read_dir(self.name(ino)?)? {
            let entry = entry?;
            // It may be gone since.
            if let Ok(meta) = entry.metadata() {
                entries.push((INodeNo(meta.ino()), kind(&meta), entry.file_name()));
            }
        }
        for (number, (ino, kind, name)) in entries.into_iter().enumerate().skip(from as usize) {
            if reply.add(ino, number as u64 + 1, kind, name) {
                break;
            }
        }
        Ok(())
    }
}

fn kind(meta: &Metadata) -> FileType {
    let file_type = meta.file_type();
    if file_type.is_dir() {
        FileType::Directory
    } else if file_type.is_symlink() {
        FileType::Symlink
    } else if file_type.is_socket() {
        FileType::Socket
    } else {
        FileType::RegularFile
    }
}

fn attributes(ino: u64, meta: &Metadata) -> FileAttr {
    let time = |seconds: i64, ns: i64| {
        SystemTime::UNIX_EPOCH
            + Duration::new(
                seconds.max(0).cast_unsigned(),
                u32::try_from(ns).unwrap_or(0),
            )
    };
    FileAttr {
        ino: INodeNo(ino),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: time(meta.atime(), meta.atime_nsec()),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: time(meta.ctime(), meta.ctime_nsec()),
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(meta),
        perm: (meta.mode() & 0o7777) as u16,
        nlink: meta.nlink() as u32,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Of every file: nothing is cached, and writes of one file need not wait for each other.
fn opened() -> FopenFlags {
    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
}

/// Answers with an entry, or an error.
fn answer_entry(result: io::Result<FileAttr>, reply: ReplyEntry) {
    match result {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(error) => reply.error(Errno::from(error)),
    }
}

fn answer_attr(result: io::Result<FileAttr>, reply: ReplyAttr) {
    match result {
        Ok(attributes) => reply.attr(&TTL, &attributes),
        Err(error) => reply.error(Errno::from(error)),
    }
}

fn answer(result: io::Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(Errno::from(error)),
    }
}

impl Filesystem for Passthrough {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.pass(move |shared| {
            let found = shared
                .child(parent, &name)
                .and_then(|name| shared.look(name));
            answer_entry(found, reply);
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        self.pass(move |shared| {
            // An open file may have lost its name.
            let open = fh.and_then(|fh| shared.file(fh).ok());
            let found = match open {
                Some(file) => file.metadata().map(|meta| attributes(ino.0, &meta)),
                None => shared.name(ino).and_then(|name| shared.look(name)),
            };
            answer_attr(found, reply);
        });
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.pass(move |shared| answer_attr(shared.set(ino, mode, size, mtime), reply));
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = name.to_owned();
        self.pass(move |shared| {
            let made = shared.child(parent, &name).and_then(|name| {
                fs::create_dir(&name)?;
                shared.look(name)
            });
            answer_entry(made, reply);
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.pass(move |shared| answer(shared.remove(parent, &name), reply));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, newname) = (name.to_owned(), newname.to_owned());
        self.pass(move |shared| {
            let renamed = shared.child(parent, &name).and_then(|from| {
                let to = shared.child(newparent, &newname)?;
                fs::rename(from, &to)?;
                shared.look(to).map(drop)
            });
            answer(renamed, reply);
        });
    }

    fn link(
        &self,
        _: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let newname = newname.to_owned();
        self.pass(move |shared| answer_entry(shared.link(ino, newparent, &newname), reply));
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.pass(move |shared| {
            let file = shared
                .name(ino)
                .and_then(|name| shared.open(&name, flags.0, None));
            match file {
                Ok(handle) => reply.opened(handle, opened()),
                Err(error) => reply.error(Errno::from(error)),
            }
        });
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = name.to_owned();
        self.pass(move |shared| {
            let made = shared.child(parent, &name).and_then(|name| {
                let handle = shared.open(&name, flags, Some(mode & !umask))?;
                Ok((handle, shared.look(name)?))
            });
            match made {
                Ok((handle, attributes)) => {
                    reply.created(&TTL, &attributes, Generation(0), handle, opened());
                }
                Err(error) => reply.error(Errno::from(error)),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.pass(move |shared| {
            let mut data = vec![0; size as usize];
            let read = shared
                .file(fh)
                .and_then(|file| file.read_at(&mut data, offset));
            match read {
                Ok(len) => reply.data(&data[..len]),
                Err(error) => reply.error(Errno::from(error)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (shared, data) = (Arc::clone(&self.shared), data.to_vec());
        self.gate
            .pass_write(move || match shared.write(ino, fh, offset, &data) {
                Ok(len) => reply.written(len),
                Err(error) => reply.error(Errno::from(error)),
            });
    }

    fn flush(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Writes are not kept back here.
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        held(&self.shared.files).remove(&fh.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.pass(move |shared| {
            answer(shared.file(fh).and_then(|file| file.sync_all()), reply);
        });
    }

    fn fsyncdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.pass(move |shared| {
            let synced = shared
                .name(ino)
                .and_then(|name| File::open(name)?.sync_all());
            answer(synced, reply);
        });
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.pass(move |shared| match shared.list(ino, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(Errno::from(error)),
        });
    }

    fn statfs(&self, _: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // Nobody who runs on it counts its blocks.
        reply.statfs(1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096);
    }
}
