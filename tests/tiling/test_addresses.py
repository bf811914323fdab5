"""Credentials and queries of addresses are for opening only."""

import pytest

from tiling import RasterError
from tiling.addresses import address_name, without_secrets

SIGNED = [
    ("https://user:word@host/dir/scene.tif?sig=a/b", "https://host/dir/scene.tif"),
    ("https://user:w@rd@host/scene.tif", "https://host/scene.tif"),
    ("s3://key:secret@bucket/scene.tif", "s3://bucket/scene.tif"),
    ("/vsicurl/https://host/scene.tif?sig=a/b", "/vsicurl/https://host/scene.tif"),
    (
        "/vsicurl?use_head=no&url=https%3A%2F%2Fhost%2Fscene.tif%3Fsig%3Da%2Fb",
        "/vsicurl/https://host/scene.tif",
    ),
    ("/vsiaz/box/scene.tif?sig=a/b", "/vsiaz/box/scene.tif"),
    ("/vsizip//vsicurl/https://host/a.zip?sig=a/scene.tif", "/vsizip//vsicurl/https://host/a.zip"),
    ("/vsicrypt/key=secret,file=scene.tif", "/vsicrypt/scene.tif"),
    ("zip+https://user:word@host/a.zip!scene.tif?sig=b", "zip+https://host/a.zip!scene.tif"),
    ('NETCDF:"https://host/f.nc?sig=a/b":Band1', 'NETCDF:"https://host/f.nc":Band1'),
    ("vrt://https://user:word@host/a.tif?sig=a/b&bands=2", "vrt://https://host/a.tif?bands=2"),
    ("https:/user:word@host/w.pth", "https:/host/w.pth"),  # as pathlib makes it
]


@pytest.mark.parametrize(("address", "shown"), SIGNED)
def test_addresses_lose_credentials_and_query(address: str, shown: str) -> None:
    assert without_secrets(address) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(("address", "shown"), SIGNED)
@pytest.mark.parametrize("sentence", ["{}: not a raster", "can't read '{}'.", "{}, {}; the end", "why {}"])
def test_addresses_in_sentences_do_too(address: str, shown: str, sentence: str) -> None:
    assert without_secrets(sentence.format(address, address)) == sentence.format(shown, shown)


@pytest.mark.parametrize(
    "address", ["a.tif", "dir/what?.tif", "/tmp/a b.tif", "netcdf:f.nc:B", "vrt://a.tif?bands=1"]
)
def test_what_is_no_secret_stays(address: str) -> None:
    assert without_secrets(address) == address


def test_errors_hold_none() -> None:
    assert (
        str(RasterError("https://user:word@host/a.tif?sig=x: not found")) == "https://host/a.tif: not found"
    )


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("dir/scene.tif", "scene"),
        ("a.b.tif", "a.b"),
        ("https://host/scene.tif?sig=a/b.c", "scene"),
        ("https://host/", "host"),
        ("https://host/..", "scene"),
        ("/vsizip/a.zip/in/b.tif", "b"),
        ("zip:///dir/a.zip!b.tif", "b"),
        ("netcdf:f.nc:Band1", "f_Band1"),
        ("netcdf:/dir/f.nc:Band2", "f_Band2"),
        ('HDF5:"dir/f.h5"://a/b', "f_a_b"),
        ("GTIFF_DIR:2:dir/f.tif", "f_2"),
        ("SENTINEL2_L2A:/dir/MTD.xml:10m:EPSG_32632", "MTD_10m_EPSG_32632"),
        ("vrt://dir/a.tif?bands=2", "a_bands_2"),
    ],
)
def test_names(address: str, name: str) -> None:
    assert address_name(address) == name
